"""Every output of the seed notebook, value for value; what needs the official weights, where they are."""

import json

import pytest

import tinyllama
from tests.text.tiny_tokenizers import DOWNLOADED
from tinyllama.checkpoints.config_file import config_from_dict
from tinyllama.checkpoints.hub import weights_folder
from tinyllama.config import LlamaConfig
from tinyllama.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def golden(shared_folder):
    return json.loads((shared_folder / "golden/seed_notebook.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["shared", "downloaded"])
def tokenizer(request, shared_folder):
    # The official folder differs: it has a tokenizer.json too, which decides on the dummy prefix.
    if request.param == "shared":
        return Tokenizer.from_folder(shared_folder / "tokenizer")
    folder = weights_folder() / DOWNLOADED
    if not (folder / "tokenizer.model").exists():
        pytest.skip(f"weights/{DOWNLOADED} is not downloaded")
    return Tokenizer.from_folder(folder)


def test_encode(golden, tokenizer):
    assert golden["encode"]
    for text, ids in golden["encode"].items():
        assert tokenizer.encode(text) == ids


def test_decode(golden, tokenizer):
    assert golden["decode"]
    for case in golden["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_chat(golden, tokenizer):
    chat = golden["chat"]
    rendered = "".join(segment.text for segment in tokenizer.chat_segments(chat["messages"]))
    assert rendered == chat["rendered"]
    assert tokenizer.chat(chat["messages"]) == chat["ids"]


def test_the_ways_around_a_chat_that_give_other_ids(golden, tokenizer):
    # Three different prompts from one chat; the notebook has all three, so all three must stay as they were.
    chat = golden["chat"]
    assert tokenizer.decode(chat["ids"]) == chat["decoded_ids"]
    assert tokenizer.encode(chat["decoded_ids"]) == chat["re_encoded_ids"]
    assert tokenizer.encode(chat["rendered"]) == [tokenizer.bos_id, *chat["ids"]]


def test_the_replies_decode_to_the_notebook_s_texts(golden, tokenizer):
    replies = [case for case in golden["greedy"] + golden["sampled"] if "new_ids" in case]
    assert len(replies) == 2
    for case in replies:
        assert tokenizer.decode(case["new_ids"], skip_special=True) == case["text"]


def test_config_and_parameters(golden):
    config = config_from_dict(golden["config"])
    assert config == LlamaConfig()
    assert sum(config.parameters.values()) == golden["num_parameters"]


@pytest.fixture(scope="module")
def official():
    if not (weights_folder() / DOWNLOADED / "model.safetensors").exists():
        pytest.skip(f"weights/{DOWNLOADED} is not downloaded")
    return tinyllama.load(str(weights_folder() / DOWNLOADED), dtype="float32", attention="sdpa")


def test_greedy_texts(golden, official):
    model, tokenizer = official
    plain, chat = golden["greedy"]
    ids = tokenizer.encode(plain["prompt"])
    (new_ids,) = tinyllama.generate(model, [ids], max_new_tokens=plain["max_new_tokens"])
    assert tokenizer.decode(ids + new_ids, skip_special=True) == plain["text"]
    ids = golden["chat"]["re_encoded_ids"]
    assert tinyllama.generate(model, [ids], max_new_tokens=chat["max_new_tokens"]) == [chat["new_ids"]]


def test_sampled_text(golden, official):
    (case,) = golden["sampled"]
    settings = {name: case[name] for name in ("seed", "temperature", "top_p", "top_k", "max_new_tokens")}
    ids = golden["chat"]["re_encoded_ids"]
    assert tinyllama.generate(official[0], [ids], **settings) == [case["new_ids"]]
