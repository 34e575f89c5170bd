"""Names, downloads and refusals, against a small Hub on this machine's loopback."""

import hashlib
import importlib.util
import json
import shutil
import socket
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tinyllama.checkpoints import files, hub
from tinyllama.errors import InputError

REPO, COMMIT = "org/small", "0123456789abcdef0123456789abcdef01234567"
CONFIG, TOKENIZER = b'{"model_type": "llama"}', b'{"version": "1.0"}'
WEIGHTS = bytes(range(256)) * 4000
PAST_THE_TEST = 60  # seconds: a hanging call that is never bounded would fail the test's own clock


class FakeHub(ThreadingHTTPServer):
    """The part of the Hub's API that a download needs; `requests` lists what was asked of it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors": WEIGHTS}
        self.requests = []
        self.refuse = {}  # part of a path -> (status, headers)
        self.cut_once = set()  # files whose connection breaks in the middle, once
        self.hang = None  # an event that every answer waits for
        self.before_file = lambda name: None

    def fetched(self):
        return [
            path.rsplit("/", 1)[-1]
            for method, path in self.requests
            if "/resolve/" in path and method == "GET"
        ]


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        hub = self.server
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path))
        if hub.hang:
            hub.hang.wait(PAST_THE_TEST)
        for part, (status, headers) in hub.refuse.items():
            if part in path:
                return self.send(status, headers, b"", with_body)
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            return self.send(200, {}, body, with_body)
        name = path.split(f"/resolve/{COMMIT}/")[-1]
        if name not in hub.files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", with_body)
        return self.send_file(name, with_body)

    def send_file(self, name, with_body):
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if with_body:
            self.server.before_file(name)
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = name in self.server.cut_once and with_body
        self.server.cut_once -= {name} if cut else set()
        self.send(206 if start else 200, headers, data[start:], with_body, cut)

    def send(self, status, headers, body, with_body, cut=False):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights folder and an empty Hub cache."""
    monkeypatch.setattr(hub, "weights_folder", lambda: tmp_path / "weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "weights"


def use_endpoint(monkeypatch, url):
    """What HF_ENDPOINT sets, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the kept client has read the proxy settings


@pytest.fixture
def fake_hub(weights, monkeypatch):
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def in_cache(weights, repo_id, commit, files):
    """Put files into the Hub's own cache, as `main` and as a commit."""
    folder = weights.parent / "cache" / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for name in files:
        (snapshot / name).write_bytes(b"{}")
    return snapshot


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my-model", "./my-model", "my-model/", "org/my-model", "~/my-model"])
def test_a_folder_is_itself(tmp_path, monkeypatch, weights, no_sockets, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / name.replace("~/", "")
    folder.mkdir(parents=True)
    assert hub.resolve(name).resolve() == folder


@pytest.mark.parametrize(
    "name",
    ["", "nothing", "weights/Foo", "./Foo", "~/Foo", "/Foo/Bar", "a/b/c", "a//b", "org/", "a\0b/c", "~x/y z"],
)
def test_what_is_no_name_gets_the_possibilities(weights, no_sockets, name):
    (weights / "Llama-2").mkdir(parents=True)
    (weights / ".download-Other").mkdir()
    with pytest.raises(InputError) as refusal:
        hub.resolve(name)
    line = str(refusal.value)
    assert f"{name!r}" in line
    assert "org/name" in line
    assert "smollm2" in line
    assert str(weights / "Llama-2") in line
    assert ".download" not in line
    assert "\n" not in line


def test_a_file_is_not_a_folder(tmp_path, weights):
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(InputError, match="is a file, expected a checkpoint folder"):
        hub.resolve(str(file))


def test_weights_are_beside_pyproject_in_a_checkout():
    assert hub.weights_folder() == Path(__file__).resolve().parents[2] / "weights"


def test_weights_are_in_the_current_folder_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(
        hub, "__file__", str(tmp_path / "site-packages" / "tinyllama" / "checkpoints" / "hub.py")
    )
    monkeypatch.chdir(tmp_path)
    assert hub.weights_folder() == tmp_path / "weights"


# --- already on the disk: no socket ----------------------------------------------------------------------


def test_a_model_in_weights_is_used(weights, no_sockets):
    (weights / "small").mkdir(parents=True)
    assert hub.resolve(REPO) == weights / "small"
    assert list(weights.iterdir()) == [weights / "small"], (
        "nothing may be written: the folder may be read-only"
    )


def test_the_default_model_in_weights_is_used(weights, no_sockets, capsys):
    (weights / "TinyLlama-1.1B-Chat-v1.0").mkdir(parents=True)
    assert hub.resolve() == weights / "TinyLlama-1.1B-Chat-v1.0"
    assert capsys.readouterr().err == ""


def test_the_embedded_model_in_weights_is_used(weights, no_sockets):
    (weights / "SmolLM2-135M-Instruct").mkdir(parents=True)
    assert hub.resolve("smollm2") == weights / "SmolLM2-135M-Instruct"


SHARDS = [
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]


@pytest.mark.parametrize("files", [["model.safetensors"], SHARDS])
def test_the_hubs_own_cache_is_used(weights, no_sockets, files):
    snapshot = in_cache(weights, REPO, COMMIT, ["config.json", "tokenizer.model", *files])
    assert hub.resolve(REPO) == snapshot
    assert not weights.exists()


def test_a_pinned_model_is_taken_from_the_cache_only_at_its_commit(weights, no_sockets, monkeypatch):
    files = ["config.json", "tokenizer.json", "model.safetensors"]
    other = in_cache(weights, hub.DEFAULT_MODEL, COMMIT, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        hub.resolve(hub.DEFAULT_MODEL)
    pinned = other.with_name(hub.REVISIONS[hub.DEFAULT_MODEL])
    other.rename(pinned)
    assert hub.resolve() == pinned


@pytest.mark.parametrize(
    "files",
    [
        ["tokenizer.json", "model.safetensors"],
        ["config.json", "model.safetensors"],
        ["config.json", "tokenizer.json"],
        ["config.json", "tokenizer.json", *SHARDS[:2]],
        ["config.json", "tokenizer.json", *SHARDS[1:]],
    ],
)
def test_a_half_model_in_the_cache_is_not_used(weights, no_sockets, monkeypatch, files):
    in_cache(weights, REPO, COMMIT, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"not on this disk, and HF_HUB_OFFLINE is set.*--model smollm2"):
        hub.resolve(REPO)


# --- downloads -------------------------------------------------------------------------------------------


def test_only_the_needed_files_are_downloaded(fake_hub, weights):
    fake_hub.files |= {
        "tokenizer_config.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00001.safetensors": b"shard",
        "original/consolidated.00.pth": b"pickle",
        "onnx/model.safetensors": b"other",
        "README.md": b"# Small",
    }
    folder = hub.resolve(REPO)
    assert folder == weights / "small"
    assert names_in(folder) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        ".origin",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / ".origin").read_text() == f"{REPO}@{COMMIT}"
    asked = len(fake_hub.requests)
    assert hub.resolve(REPO) == folder
    assert len(fake_hub.requests) == asked


def test_shards_come_with_their_index(fake_hub):
    del fake_hub.files["model.safetensors"]
    fake_hub.files |= dict.fromkeys(SHARDS, b"{}")
    assert set(SHARDS) < names_in(hub.resolve(REPO))


def test_the_default_model_is_asked_for_at_its_pinned_commit(fake_hub, weights):
    pinned = hub.REVISIONS[hub.DEFAULT_MODEL]
    folder = hub.resolve()
    assert folder == weights / "TinyLlama-1.1B-Chat-v1.0"
    assert fake_hub.requests[0][1] == f"/api/models/{hub.DEFAULT_MODEL}/revision/{pinned}"


def test_models_of_one_name_do_not_mix(fake_hub, weights):
    assert hub.resolve(REPO) == weights / "small"
    assert hub.resolve("other/small") == weights / "other--small"
    embedded_folder = weights / "SmolLM2-135M-Instruct"
    assert hub.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") != embedded_folder
    assert not embedded_folder.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, r"only pytorch_model\.bin, refused: pickle"),
        ({"config.json": b"{}", "consolidated.00.pth": b""}, r"only consolidated\.00\.pth, refused: pickle"),
        ({"config.json": b"{}"}, r"expected model\.safetensors or .*found none"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{}"}, "and its shards, found none"),
        ({"config.json": b"{}", SHARDS[1]: b""}, "and its shards, found none"),
        ({"model.safetensors": b""}, r"expected config\.json"),
    ],
)
def test_a_repository_without_a_checkpoint_is_refused(fake_hub, weights, files, message):
    fake_hub.files = files
    with pytest.raises(InputError, match=message):
        hub.resolve(REPO)
    assert fake_hub.fetched() == []
    assert hub.checkpoint_folders() == []


def test_a_full_disk_is_refused_beforehand(fake_hub, weights, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 7, 3))
    total = len(CONFIG) + len(TOKENIZER) + len(WEIGHTS)
    with pytest.raises(InputError, match=f"needs {total:,} bytes of disk, 3 are free"):
        hub.resolve(REPO)
    assert fake_hub.fetched() == []


def test_a_disk_that_fills_up_is_an_input_error(fake_hub, weights, monkeypatch):
    def disk_full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", disk_full)
    with pytest.raises(InputError, match="the disk is full"):
        hub.resolve(REPO)
    assert hub.checkpoint_folders() == []


@pytest.fixture
def no_pauses(monkeypatch):
    """huggingface_hub pauses before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_an_interrupted_download_goes_on(fake_hub, weights, no_pauses):
    fake_hub.refuse["model.safetensors"] = (500, {})
    with pytest.raises(InputError, match="run this again, finished files are kept"):
        hub.resolve(REPO)
    assert hub.checkpoint_folders() == []
    killed = weights / ".download-small" / ".cache" / "huggingface" / "download" / "x.incomplete"
    killed.write_bytes(b"of a killed process")
    fake_hub.refuse.clear()
    fake_hub.requests.clear()
    assert (hub.resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert fake_hub.fetched() == ["model.safetensors"]
    assert hub.checkpoint_folders() == [weights / "small"]
    assert not list(weights.rglob("*.incomplete"))


def test_a_broken_connection_is_taken_up_where_it_broke(fake_hub, no_pauses):
    fake_hub.cut_once.add("model.safetensors")
    assert (hub.resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert fake_hub.fetched().count("model.safetensors") == 2


def test_files_of_another_commit_are_not_mixed_in(fake_hub, weights):
    stale = weights / ".download-small"
    stale.mkdir(parents=True)
    (stale / ".origin").write_text(f"{REPO}@{COMMIT[::-1]}")
    (stale / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    assert "model-00001-of-00002.safetensors" not in names_in(hub.resolve(REPO))


def test_ctrl_c_leaves_no_model_and_no_lock(fake_hub, weights, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "hf_hub_download", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve(REPO)
    assert hub.checkpoint_folders() == []
    assert hub.resolve(REPO) == weights / "small"


def test_two_at_once_download_once(fake_hub, weights, monkeypatch):
    # flock belongs to an open file, so two threads contend for it as two processes do.
    downloading, waiting, notes = threading.Event(), threading.Event(), []

    def before_file(name):
        downloading.set()
        assert waiting.wait(10)

    def note(line):
        notes.append(line)
        waiting.set()

    fake_hub.before_file = before_file
    monkeypatch.setattr(files, "note", note)
    first = threading.Thread(target=hub.resolve, args=[REPO])
    first.start()
    assert downloading.wait(10)
    assert hub.resolve(REPO) == weights / "small"
    first.join()
    assert sorted(fake_hub.fetched()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert notes == [f"another process is downloading {REPO}: waiting for it"]


# --- refusals and silence --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, r"private, not there, or a wrong login.*hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, r"gated.*hf auth login"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
        (429, {}, "no more requests"),
        (418, {}, "refused the request"),
    ],
)
def test_refusals_are_told_apart(fake_hub, weights, status, headers, message):
    fake_hub.refuse["/api/"] = (status, headers)
    for name in (REPO, None):
        with pytest.raises(InputError, match=message) as refusal:
            hub.resolve(name)
        assert f"status {status}" in str(refusal.value)
        assert "--model smollm2" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert hub.checkpoint_folders() == []


@pytest.fixture
def silent(request, fake_hub, monkeypatch):
    """Each way in which the Hub may be out of reach; gives what the message says."""
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    forever = threading.Event()
    if request.param == "no answer":
        fake_hub.hang = forever
    elif request.param == "name resolution hangs":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: forever.wait(PAST_THE_TEST))
        use_endpoint(monkeypatch, "http://hub.invalid")
    elif request.param == "refused":
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
    elif request.param == "out of order":
        fake_hub.refuse["/api/"] = (503, {})
    elif request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield {
        "no answer": "did not answer within 0.3 seconds",
        "name resolution hangs": "did not answer within 0.3 seconds",
        "refused": "cannot be reached",
        "out of order": "out of order (status 503)",
        "offline": "HF_HUB_OFFLINE is set",
    }[request.param]
    forever.set()


SILENCES = ["no answer", "name resolution hangs", "refused", "out of order", "offline"]


@pytest.mark.parametrize("silent", SILENCES, indirect=True)
def test_a_named_model_is_never_replaced(silent, weights):
    start = time.monotonic()
    with pytest.raises(InputError) as refusal:
        hub.resolve(REPO)
    assert time.monotonic() - start < PAST_THE_TEST / 2
    assert silent in str(refusal.value)
    assert "--model smollm2" in str(refusal.value)
    assert hub.checkpoint_folders() == []


@pytest.mark.parametrize("silent", SILENCES, indirect=True)
def test_the_default_model_is_replaced_and_one_line_says_so(silent, weights, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(hub, "make_embedded", lambda folder: made.append(folder) or folder)
    assert hub.resolve() == weights / "SmolLM2-135M-Instruct"
    assert made == [weights / "SmolLM2-135M-Instruct"]
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert silent in output.err
    assert "embedded SmolLM2-135M-Instruct" in output.err


def test_an_answer_that_is_not_the_hubs_is_no_answer(fake_hub, monkeypatch):
    monkeypatch.setattr(
        Handler, "send", lambda self, *arguments: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n<html>")
    )
    with pytest.raises(InputError, match="cannot be reached"):
        hub.resolve(REPO)


def test_the_hub_has_a_few_seconds():
    assert hub.ANSWER_SECONDS <= 5


# --- the script ------------------------------------------------------------------------------------------


@pytest.fixture
def script(weights, monkeypatch):
    """scripts/download.py's main, given a command line."""
    file = Path(__file__).parents[2] / "scripts" / "download.py"
    spec = importlib.util.spec_from_file_location("download_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "weights_folder", hub.weights_folder)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["download.py", *arguments])
        return module.main()

    return run


def test_the_script_downloads_and_lists(script, fake_hub, weights, capsys):
    script("--list")
    assert capsys.readouterr().out == f"{weights} has no models yet\n"
    script(REPO)
    size = sum(map(len, (CONFIG, TOKENIZER, WEIGHTS, f"{REPO}@{COMMIT}")))
    assert capsys.readouterr().out == f"{REPO} is in {weights / 'small'} ({size:,} bytes)\n"
    (weights / ".download-other").mkdir()
    script("--list")
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == f"{weights / 'small'}  {size:,} bytes"
    assert "unfinished" in listed[1]


def test_the_script_never_takes_another_model(script, weights, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=hub.DEFAULT_MODEL):
        script()


def test_the_script_refuses_a_name_to_list(script, capsys):
    with pytest.raises(SystemExit, match="2"):
        script("--list", REPO)
    assert "--list takes no NAME" in capsys.readouterr().err
