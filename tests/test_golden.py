"""Tokenizer and chat template against the outputs of the seed notebook, value for value."""

import json

import pytest

from tests.tiny_tokenizers import DOWNLOADED
from tinyllama.hub import weights_folder
from tinyllama.tokenizer import Tokenizer


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
