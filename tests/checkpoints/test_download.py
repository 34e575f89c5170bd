"""Downloads and refusals, against a small Hub on this machine's loopback."""

import importlib.util
import shutil
import socket
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoints.fake_hub import (
    COMMIT,
    CONFIG,
    PAST_THE_TEST,
    REPO,
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    Handler,
    use_endpoint,
)
from tinyllama.checkpoints import download, hub
from tinyllama.errors import InputError


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_needed_files_are_downloaded_and_only_once(fake_hub, weights):
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
    assert hub.resolve() == weights / "TinyLlama-1.1B-Chat-v1.0"
    pinned = hub.REVISIONS[hub.DEFAULT_MODEL]
    assert fake_hub.requests[0][1] == f"/api/models/{hub.DEFAULT_MODEL}/revision/{pinned}"


def test_models_of_one_name_do_not_mix(fake_hub, weights):
    assert hub.resolve(REPO) == weights / "small"
    assert hub.resolve("other/small") == weights / "other--small"
    embedded_folder = weights / "SmolLM2-135M-Instruct"
    assert hub.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") != embedded_folder
    assert not embedded_folder.exists()


def test_a_config_can_be_downloaded_alone(fake_hub, weights):
    file = download.download_config(REPO)
    assert file.read_bytes() == CONFIG
    assert fake_hub.fetched() == ["config.json"]
    fake_hub.files = {}
    with pytest.raises(InputError, match=r"other/small: config\.json"):
        download.download_config("other/small")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, r"only pytorch_model\.bin, refused: pickle"),
        ({"config.json": b"{}", "consolidated.00.pth": b""}, r"only consolidated\.00\.pth, refused: pickle"),
        ({"model-Q4.gguf": b""}, r"only model-Q4\.gguf: GGUF is llama.cpp's format"),
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
    assert names_in(weights) == {".small.lock"}


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

    monkeypatch.setattr(download, "hf_hub_download", disk_full)
    with pytest.raises(InputError, match=r"No space left on device.*make room"):
        hub.resolve(REPO)
    assert hub.checkpoint_folders() == []


@pytest.fixture
def no_pauses(monkeypatch):
    """huggingface_hub pauses before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_an_interrupted_download_keeps_its_finished_files(fake_hub, weights, no_pauses):
    fake_hub.refuse["model.safetensors"] = (500, {})
    with pytest.raises(InputError, match="run this again, finished files are kept"):
        hub.resolve(REPO)
    assert hub.checkpoint_folders() == []
    killed = weights / ".unfinished-small" / ".cache" / "huggingface" / "download" / "x.incomplete"
    killed.write_bytes(b"of a killed process")
    fake_hub.refuse.clear()
    fake_hub.requests.clear()
    assert (hub.resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert fake_hub.fetched() == ["model.safetensors"]
    assert names_in(weights / "small") == {"config.json", "tokenizer.json", "model.safetensors", ".origin"}


def test_a_broken_connection_is_taken_up_where_it_broke(fake_hub, no_pauses):
    fake_hub.cut_once.add("model.safetensors")
    assert (hub.resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert fake_hub.fetched().count("model.safetensors") == 2


def test_files_of_another_commit_are_not_mixed_in(fake_hub, weights):
    stale = weights / ".unfinished-small"
    stale.mkdir(parents=True)
    (stale / ".origin").write_text(f"{REPO}@{COMMIT[::-1]}")
    (stale / SHARDS[1]).write_bytes(b"stale")
    assert SHARDS[1] not in names_in(hub.resolve(REPO))


# --- refusals and silence --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, r"private, not there, or a wrong login.*hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, r"gated.*hf auth login"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
        (429, {}, "no more requests now"),
        (418, {}, "refused the request"),
    ],
)
def test_each_refusal_has_its_message(fake_hub, weights, status, headers, message):
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
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
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
    elif request.param == "not HTTP":
        garbage = b"HTTP/1.0 200 OK\r\n\r\n<html>"
        monkeypatch.setattr(Handler, "send", lambda self, *arguments: self.wfile.write(garbage))
    elif request.param == "out of order":
        fake_hub.refuse["/api/"] = (503, {})
    elif request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield SILENCES[request.param]
    forever.set()


SILENCES = {
    "no answer": "did not answer within 0.3 seconds",
    "name resolution hangs": "did not answer within 0.3 seconds",
    "refused": "cannot be reached",
    "not HTTP": "cannot be reached",
    "out of order": "out of order (status 503)",
    "offline": "HF_HUB_OFFLINE is set",
}


@pytest.mark.parametrize("silent", SILENCES, indirect=True)
def test_without_the_hub_only_the_default_model_is_replaced(silent, weights, capsys):
    start = time.monotonic()
    with pytest.raises(InputError) as refusal:
        hub.resolve(REPO)
    assert time.monotonic() - start < PAST_THE_TEST / 2
    assert silent in str(refusal.value)
    assert "--model smollm2" in str(refusal.value)
    assert hub.checkpoint_folders() == []

    embedded = weights / "SmolLM2-135M-Instruct"
    embedded.mkdir()
    assert hub.resolve() == embedded
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert silent in output.err
    assert "embedded SmolLM2-135M-Instruct" in output.err


# --- the script ------------------------------------------------------------------------------------------


@pytest.fixture
def script(weights, monkeypatch):
    """scripts/download.py's main, given a command line."""
    file = Path(__file__).parents[2] / "scripts" / "download.py"
    spec = importlib.util.spec_from_file_location("download_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

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
    (weights / ".unfinished-other").mkdir()
    script("--list")
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == f"{weights / 'small'}  {size:,} bytes"
    assert "unfinished" in listed[1]
    with pytest.raises(SystemExit, match="2"):
        script("--list", REPO)


def test_the_script_never_takes_another_model(script, weights, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=hub.DEFAULT_MODEL):
        script()
