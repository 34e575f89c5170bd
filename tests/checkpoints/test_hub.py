"""A model's name -> its folder: what a name can be, and what is found without asking anybody."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoints.fake_hub import COMMIT, REPO, SHARDS
from tinyllama.checkpoints import hub
from tinyllama.errors import InputError


def in_cache(weights, repo_id, files):
    """Put files into the Hub's own cache, as `main` and as a commit."""
    folder = weights.parent / "cache" / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name in files:
        (snapshot / name).write_bytes(b"{}")
    return snapshot


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
    (weights / ".unfinished-Other").mkdir()
    with pytest.raises(InputError) as refusal:
        hub.resolve(name)
    line = str(refusal.value)
    for part in (repr(name), "org/name", "smollm2", str(weights / "Llama-2")):
        assert part in line
    assert ".unfinished" not in line
    assert "\n" not in line


def test_a_file_is_not_a_folder(tmp_path, weights):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file, expected a checkpoint folder"):
        hub.resolve(str(file))


@pytest.mark.parametrize("name", ["model.gguf", "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF", "org/x-gguf"])
def test_gguf_is_told_what_works_instead(weights, no_sockets, name):
    with pytest.raises(
        InputError, match=r"GGUF is llama.cpp's format, expected safetensors; give .*smollm2$"
    ):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["SmolLM2", "TinyLlama/tinyllama-1.1b-chat-v1.0"])
def test_a_known_name_is_found_in_any_case(weights, no_sockets, name):
    for folder in ("SmolLM2-135M-Instruct", "TinyLlama-1.1B-Chat-v1.0"):
        (weights / folder).mkdir(parents=True)
    assert hub.resolve(name).name.lower().startswith(name.lower().split("/")[-1])


@pytest.mark.parametrize(
    ("name", "meant"),
    [("smolm2", "smollm2"), ("SmolLM2-135M-Instruct", "smollm2"), ("tiny-llama", hub.DEFAULT_MODEL)],
)
def test_a_misspelt_name_is_told_the_nearest_without_asking_the_hub(weights, no_sockets, name, meant):
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        hub.resolve(name)


def test_weights_are_beside_pyproject_or_in_the_current_folder(tmp_path, monkeypatch):
    assert hub.weights_folder() == Path(__file__).resolve().parents[2] / "weights"
    installed = tmp_path / "site-packages" / "tinyllama" / "checkpoints" / "hub.py"
    monkeypatch.setattr(hub, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    assert hub.weights_folder() == tmp_path / "weights"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (REPO, "small"),
        (None, "TinyLlama-1.1B-Chat-v1.0"),
        ("smollm2", "SmolLM2-135M-Instruct"),
    ],
)
def test_a_model_in_weights_is_used_without_a_word_or_a_write(weights, no_sockets, capsys, name, folder):
    (weights / folder).mkdir(parents=True)
    assert hub.resolve(name) == weights / folder
    assert list(weights.rglob("*")) == [weights / folder]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("files", [["model.safetensors"], SHARDS])
def test_the_hubs_own_cache_is_used(weights, no_sockets, files):
    snapshot = in_cache(weights, REPO, ["config.json", "tokenizer.model", *files])
    assert hub.resolve(REPO) == snapshot
    assert not weights.exists()


def test_a_pinned_model_is_taken_from_the_cache_only_at_its_commit(weights, no_sockets, monkeypatch):
    other = in_cache(weights, hub.DEFAULT_MODEL, ["config.json", "tokenizer.json", "model.safetensors"])
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
    in_cache(weights, REPO, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"not on this disk, and HF_HUB_OFFLINE is set.*--model smollm2"):
        hub.resolve(REPO)
