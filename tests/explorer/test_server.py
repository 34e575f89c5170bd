"""The server answers whoever has the address, on this machine, and nobody else; nothing sent to it is run."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.explorer.serving import SECRET, served
from tests.marks import unix
from tests.scripts.test_scripts import run_script, write_checkpoint
from tinyllama.checkpoints.load import load
from tinyllama.errors import InputError
from tinyllama.explorer.server import LARGEST_REQUEST, listen
from tinyllama.explorer.session import Session
from tinyllama.lab.kernel_file import BUILT_IN

__all__ = ["run_script"]  # a fixture


class Client:
    """Sends requests with any headers."""

    def __init__(self, port: int) -> None:
        self.host = f"127.0.0.1:{port}"

    def __call__(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Host": self.host, **({"Content-Type": "application/json"} if data else {})}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("POST" if data else "GET"), path, data, sent)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        kind = response.headers["Content-Type"] or ""
        return response.status, json.loads(text) if "json" in kind else text, dict(response.headers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("server"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def ask(folder: Path) -> Iterator[Client]:
    model, tokenizer = load(str(folder), device="cpu", dtype="float32", weights="exact")
    session = Session(model, tokenizer, tokenizer.encode("a b ab"), "tiny", BUILT_IN)
    with served(session) as port:
        yield Client(port)


def test_it_answers_whoever_has_the_address(ask):
    status, page, headers = ask(f"/{SECRET}/")
    assert status == 200
    assert "<title>tinyllama explorer</title>" in page
    assert SECRET not in page
    assert headers["content-security-policy"] == "frame-ancestors 'none'"  # what a page cannot say of itself
    assert "default-src &#39;none&#39;" in page
    assert headers["referrer-policy"] == "no-referrer"
    assert ask(f"/{SECRET}/view/state")[1]["branches"][0]["name"] == "original"
    status, state, _ = ask(f"/{SECRET}/act/step", {"branch": 0}, Origin=f"http://{ask.host}")
    assert status == 200
    assert len(state["branches"][0]["tokens"]) > 3


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/wrong/", {}),
        ("/the-secreT/view/state", {}),
        ("/é/view/state", {}),
        (f"/{SECRET}/", {"Host": "evil.example"}),
        (f"/{SECRET}/view/state", {"Host": "localhost:80"}),
        (f"/{SECRET}/view/state", {"Origin": "http://evil.example"}),
        (f"/{SECRET}/view/state", {"Origin": "null"}),
        (f"/{SECRET}/saved", {"Origin": "https://127.0.0.1"}),
    ],
)
def test_a_wrong_secret_host_or_origin_is_refused(ask, path, headers):
    status, answer, _ = ask(path.replace("é", "%C3%A9"), **headers)
    assert status == 403
    assert set(answer) == {"error"}


def test_nothing_else_is_there(ask):
    for path in ("/", "/view/state", f"/{SECRET}/../pyproject.toml", f"/{SECRET}/view/../../x", "/docs"):
        assert ask(path)[0] in (403, 404)
    assert ask(f"/{SECRET}/act/step")[0] == 405  # a link or an image cannot change anything


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("act/step", b"not json", "expected JSON"),
        ("act/step", b"[1]", "expected a JSON object"),
        ("act/step", b"[" * 100_000, "expected JSON"),
        ("act/step", b"x" * (LARGEST_REQUEST + 1), "bytes at most"),
        ("act/fork", {"kind": "kernel", "layer": 0, "kernel": "/tmp/x.py:f"}, "kernel: expected one of"),
        ("act/text", {"text": "a " * 5000}, "the context of the model"),
        ("act/text", {"text": {"a": 1}}, "expected a text"),
        ("act/__init__", {}, "no such action"),
        ("act/begin", {"ids": [1]}, "no such action"),
    ],
)
def test_bad_requests_are_refused_in_one_line(ask, name, body, message):
    status, answer, _ = ask(f"/{SECRET}/{name}", body)
    assert status == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def test_a_form_of_another_site_has_not_the_right_type(ask):
    status, answer, _ = ask(f"/{SECRET}/act/step", b"{}", Content_Type="text/plain")
    assert (status, answer) == (400, {"error": "expected JSON"})


def test_bad_queries_are_refused(ask):
    for query in (
        "map?layer=99&head=0",
        "map?layer=x",
        "row?layer=0&head=0&token=-1",
        "choice?token=0&seed=x",
    ):
        assert ask(f"/{SECRET}/view/{query}")[0] == 400


def test_a_computation_can_be_stopped_and_changes_nothing(ask, monkeypatch):
    before = ask(f"/{SECRET}/view/state")[1]
    begun = threading.Event()
    from tinyllama.explorer import session

    original = session.record

    def slow(model, ids, capacity=None, done=lambda tokens: None):
        begun.set()
        for tokens in range(600):
            done(tokens)
            time.sleep(0.05)
        return original(model, ids, capacity, done)

    monkeypatch.setattr(session, "record", slow)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(f"/{SECRET}/act/text", {"text": "b"})))
    thread.start()
    assert begun.wait(10)
    assert re.fullmatch(r"\d+ of \d+ tokens|", ask(f"/{SECRET}/progress")[1]["progress"])
    ask(f"/{SECRET}/act/cancel", {})
    thread.join(20)
    assert answers[0][:2] == (400, {"error": "stopped"})
    assert ask(f"/{SECRET}/view/state")[1] == before


def test_it_listens_on_this_machine_alone_and_says_so_if_the_port_is_taken():
    listener = listen(0)
    assert listener.getsockname()[0] == "127.0.0.1"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match="give another"):
            listen(other.getsockname()[1])
    listener.close()


SCRIPT = [sys.executable, "scripts/explore.py"]


@unix
def test_the_script_prints_its_address_and_ends_with_ctrl_c(folder):
    process = subprocess.Popen(
        [*SCRIPT, "--model", str(folder), "--no-browser", "a b"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    address = next(line.strip() for line in lines if line.startswith("http://127.0.0.1:"))
    port, secret = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/", address).groups()
    assert Client(int(port))(f"/{secret}/")[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert "Traceback" not in process.stderr.read()


def test_the_script_writes_a_page_and_a_text(folder, tmp_path, run_script):
    out = tmp_path / "page.html"
    for options in (["--html", out], ["--text"]):
        status, said, told = run_script("explore", "--model", folder, *options, "a b\x1b[2J")
        assert status == 0, told
        assert "\x1b" not in said + told
    assert "looks at" in said
    assert out.read_text("utf-8").rstrip().endswith("</html>")
    status, said, told = run_script("explore", "--model", folder, "--no-browser", "a " * 3000)
    assert (status, said) == (2, "")
    assert told.splitlines()[-1].startswith("error: the text has ")
