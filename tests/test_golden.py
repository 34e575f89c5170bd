"""Every output of the seed notebook, value for value; some tests need the official weights."""

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
    return Tokenizer.from_folder(
        shared_folder / "tokenizer" if request.param == "shared" else official_folder()
    )


def official_folder():
    folder = weights_folder() / DOWNLOADED
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"weights/{DOWNLOADED} is not downloaded")
    return folder


def test_texts_have_the_notebook_s_ids(golden, tokenizer):
    assert {text: tokenizer.encode(text) for text in golden["encode"]} == golden["encode"] != {}


def test_ids_have_the_notebook_s_texts(golden, tokenizer):
    assert golden["decode"]
    for case in golden["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
    replies = [case for case in golden["greedy"] + golden["sampled"] if "new_ids" in case]
    assert len(replies) == 2
    for case in replies:
        assert tokenizer.decode(case["new_ids"], skip_special=True) == case["text"]


def test_a_chat_has_the_notebook_s_ids_on_each_of_three_routes(golden, tokenizer):
    chat = golden["chat"]
    rendered = "".join(segment.text for segment in tokenizer.chat_segments(chat["messages"]))
    assert rendered == chat["rendered"]
    assert tokenizer.chat(chat["messages"]) == chat["ids"]
    assert tokenizer.encode(rendered) == [tokenizer.bos_id, *chat["ids"]]
    assert tokenizer.decode(chat["ids"]) == chat["decoded_ids"]
    assert tokenizer.encode(chat["decoded_ids"]) == chat["re_encoded_ids"]


def test_config_and_parameters(golden):
    config = config_from_dict(golden["config"])
    assert config == LlamaConfig()
    assert sum(config.parameters.values()) == golden["num_parameters"]


@pytest.fixture(scope="module")
def official():
    return tinyllama.load(str(official_folder()), dtype="float32", attention="sdpa")


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
