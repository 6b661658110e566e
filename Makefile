# Two commands do everything, set-up included: `make demo` and `make test`.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SETUP_FILES := pyproject.toml $(wildcard environment/*)

.PHONY: setup demo test gpu quick check format clean

setup: $(STAMP)  ## build $(VENV) with pinned packages; at once when nothing changed

$(STAMP): $(SETUP_FILES)
	VENV=$(VENV) bash environment/setup.sh
	@touch $@

demo: setup  ## the main job on the embedded default; ends in a table and runs/demo/report.html
	@$(BIN)/gpt4image demo

check: setup  ## format, lint and types
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

# What starts clusters and engines has the machine to itself: beside each other two such tests starve.
PYTEST := $(BIN)/python -m pytest -q --durations=10
TWO := $(PYTEST) -n 2

test: check  ## everything but what needs a GPU
	@$(TWO) -m 'not alone and not gpu'
	@$(PYTEST) -m 'alone and not gpu'

gpu: setup  ## what needs a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

quick: check  ## without what takes long or starts Ray clusters and engines
	@$(TWO) -m 'not slow and not alone and not gpu'

format: setup  ## rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove what runs left behind; keeps the environment
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache
