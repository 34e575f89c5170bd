"""Tokenizer folders for tests: Llama's if it can be found, and small ones made on the spot."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from tinyllama.checkpoints.hub import weights_folder

DOWNLOADED = "TinyLlama-1.1B-Chat-v1.0"
LLAMA_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


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


def json_definition(**changes: object) -> dict[str, object]:
    """A tokenizer.json with a sentencepiece-like vocabulary: bytes, a few pieces, Llama 2's normalizer."""
    pieces = [
        *LLAMA_SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "▁b",
        "ab",
        "▁ab",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(list(LLAMA_SPECIAL))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return json.loads(tokenizer.to_str()) | changes


def adds(template: str) -> dict[str, object]:
    """The post-processor of a tokenizer.json that makes "<s> $A", say, of a text $A."""
    return json.loads(TemplateProcessing(template, special_tokens=[*LLAMA_SPECIAL.items()]).__getstate__())
