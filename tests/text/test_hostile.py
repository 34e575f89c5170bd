"""Tokenizer files that nobody would write: one InputError, whatever the libraries raise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.text.tiny_tokenizers import json_definition, sentencepiece_folder, write_json
from tinyllama.errors import InputError
from tinyllama.text.chat import render_chat
from tinyllama.text.special_tokens import SpecialTokens
from tinyllama.text.tokenizer import Tokenizer

UNIGRAM = {"type": "Unigram", "vocab": [["a", -1.0]], "byte_fallback": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # Rust panics
        {"model": UNIGRAM},  # a text has unknown characters, and there is no token for them
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"added_tokens": [{"id": -1, "content": "<s>"}]},
        {"added_tokens": [{"id": 10**12, "content": "<s>"}]},
        {"added_tokens": [{"id": float("inf"), "content": "<s>"}]},
        {"added_tokens": [{"id": None, "content": "<s>"}]},
        {"added_tokens": [{"id": 1, "content": "x" * 6000}]},
        {"added_tokens": [{"id": 1, "content": "\ud800"}]},
    ],
)
def test_a_tokenizer_json_is_refused_when_it_is_read_or_used(tmp_path: Path, changes: dict[str, object]):
    write_json(tmp_path / "tokenizer.json", json_definition(**changes))
    with pytest.raises(InputError) as error:
        Tokenizer.from_folder(tmp_path).encode("a text: é")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "x" * 6000},
        {"bos_token": "\ud800"},
        {"bos_token": ["<s>"] * 2000},
        {"legacy": "x" * 5000},
        {"added_tokens_decoder": {"1e999": {"content": "<s>"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "<s>"}}},
        {"added_tokens_decoder": [1]},
        {"chat_template": "x" * (1 << 21)},
        {"chat_template": {"default": 1}},
    ],
)
def test_a_tokenizer_config_is_refused_in_one_short_line(tmp_path: Path, config: dict[str, object]):
    sentencepiece_folder(tmp_path, **config)
    with pytest.raises(InputError) as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_of_gigabytes_is_refused_by_its_size(tmp_path: Path, name: str):
    sentencepiece_folder(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.write(b" ")  # the rest is a hole
        file.truncate(3 << 30)
    with pytest.raises(InputError, match=f"{name}: expected at most"):
        Tokenizer.from_folder(tmp_path)


def test_a_piece_that_is_no_utf8_is_refused(tmp_path: Path):
    sentencepiece_folder(tmp_path)
    model = tmp_path / "tokenizer.model"
    content = model.read_bytes()
    model.write_bytes(content.replace(b"the", b"t\xff\xfe", 1))
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_long_special_tokens_are_found_in_time():
    tokens = [f"{number:03d}{'x' * 990}" for number in range(200)]
    special = SpecialTokens(tokens, tokens)
    mask = {character: chr(0xF0000 + ord(character)) for character in "x0123456789"}
    hidden = special.hide(f"{tokens[3]} and {tokens[7][:500]}", mask)
    assert [part.origin for part in special.split(hidden, "text")] == ["text"]
    assert hidden.count("x") > 900  # only what could begin a token is masked


TOOLS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% elif m.content is mapping %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("call", [{"content": None}, {}, {"content": ""}])
@pytest.mark.parametrize("answer", [{"temperature": 21.5, "place": "Bonn"}, "21.5"])
def test_tool_messages_are_rendered_as_in_transformers(call: dict[str, object], answer: object):
    tool_calls = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Bonn"}}}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "tool_calls": tool_calls, **call},
        {"role": "tool", "name": "weather", "content": answer},
    ]
    (expected,), _ = render_jinja_template([messages], chat_template=TOOLS)
    special = SpecialTokens(["</s>"], ["</s>"])
    assert "".join(part.text for part in render_chat(TOOLS, messages, special, {})) == expected
    messages[2]["content"] = {"place": "</s>"}
    with pytest.raises(InputError, match="special token"):
        render_chat(TOOLS, messages, special, {})


def test_a_saved_chat_with_a_lone_surrogate_is_refused_when_it_is_read_by_the_model(tmp_path: Path):
    sentencepiece_folder(tmp_path, chat_template=TOOLS)
    messages = json.loads('[{"role": "user", "content": "\\ud800"}]')
    with pytest.raises(InputError, match="lone surrogate"):
        Tokenizer.from_folder(tmp_path).chat(messages)
