"""Tokenizer folders for tests: Llama's if it can be found, and small ones made on the spot."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tinyllama.checkpoints.hub import weights_folder

DOWNLOADED = "TinyLlama-1.1B-Chat-v1.0"


def find_llama_folder() -> Path:
    """The folder with the Llama tokenizer: the shared one, or a downloaded checkpoint; skip without both."""
    if "TINYLLAMA_SHARED" in os.environ:
        return Path(os.environ["TINYLLAMA_SHARED"]) / "tokenizer"
    folder = weights_folder() / DOWNLOADED
    if not (folder / "tokenizer.model").exists():
        pytest.skip(f"no Llama tokenizer: TINYLLAMA_SHARED is not set and weights/{DOWNLOADED} is not there")
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def sentencepiece_folder(folder: Path, **config: object) -> Path:
    """A folder with a small tokenizer.model of Llama's kind (BPE, byte fallback, nothing normalized)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ate the hat"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config:
        write_json(folder / "tokenizer_config.json", config)
    return folder


def added_token(index: int, content: str, **options: bool) -> dict[str, object]:
    """One of `added_tokens` in a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content} | flags | options


def json_definition(**changes: object) -> dict[str, object]:
    """A tokenizer.json with a sentencepiece-like vocabulary: bytes, a few pieces, Llama 2's normalizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(index, pieces[index]) for index in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [["▁", "a"], ["▁", "b"], ["a", "b"], ["▁", "ab"]],
        },
        **changes,
    }


def bos_first(token: str, index: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts one token before every text."""
    start, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
