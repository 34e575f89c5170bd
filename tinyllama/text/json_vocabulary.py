"""The vocabulary of a tokenizer.json (`tokenizers`).

Two kinds are understood: byte-level BPE, which spells every byte as a printable character (Llama 3, SmolLM2),
and a sentencepiece model written in this format (Llama 2 without its tokenizer.model).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from tinyllama.checkpoints.files import AGAIN, one_line
from tinyllama.errors import InputError
from tinyllama.text.tokenizer_files import TokenizerFiles, flatten
from tinyllama.text.vocabulary import EACH_BYTE, Vocabulary, sentencepiece_bytes

SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}

# `Tokenizer` adds special tokens; truncation or padding stored in the file would change texts unasked.
LEFT_OUT: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


def byte_spellings() -> dict[str, int]:
    """The character that spells a byte -> the byte (GPT-2, encoder.py, bytes_to_unicode).

    Printable Latin-1 characters spell themselves, the other bytes get the characters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


SPELLED = byte_spellings()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece; a piece with any other character stands for its own UTF-8."""
    if all(character in SPELLED for character in piece):
        return bytes(SPELLED[character] for character in piece)
    return piece.encode("utf-8")


def json_vocabulary(files: TokenizerFiles) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    A Metaspace step loses a space at the start of a text, as it does in `tokenizers` itself.

    Raises:
        InputError: the file is malformed, or of another kind.
    """
    assert files.json is not None
    path = files.folder / "tokenizer.json"
    decoder = {str(step.get("type")) for step in files.steps("decoder")}
    byte_level = decoder == {"ByteLevel"}
    if not byte_level and not {"ByteFallback"} <= decoder <= SENTENCEPIECE_STEPS:
        raise InputError(
            f"{path}: decoder {sorted(decoder)}, expected ByteLevel, or the ByteFallback of a "
            "sentencepiece model: not supported; use another checkpoint"
        )
    dummy_prefix = bool(decoder & {"Strip", "Metaspace"})
    definition = files.json | LEFT_OUT
    first_part = later_part = _build(path, definition)
    if dummy_prefix and not files.prefixes_every_part():
        later_part = _build(path, _without_prefix(definition))
    ids: dict[str, int] = first_part.get_vocab()
    unknown = {byte for character, byte in SPELLED.items() if byte_level and character not in ids}

    def encode(text: str, first: bool) -> list[int]:
        _check_bytes(text, unknown, path)
        with library_errors(path):
            found: list[int] = (
                (first_part if first else later_part).encode(text, add_special_tokens=False).ids
            )
        return found

    bos = files.template_bos()
    return Vocabulary(
        pieces={index: piece for piece, index in ids.items()},
        piece_bytes=byte_level_bytes if byte_level else sentencepiece_bytes,
        encode=encode,
        spells_space=not byte_level,
        dummy_prefix=dummy_prefix,
        decode_errors="replace" if byte_level else EACH_BYTE,
        adds_bos=bos is not None,
        named_tokens={"bos_token": bos} if bos else {},
    )


def _build(path: Path, definition: dict[str, Any]) -> tokenizers.Tokenizer:
    with library_errors(path):
        return tokenizers.Tokenizer.from_str(json.dumps(definition))


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Turn what `tokenizers` raises into an InputError; it has no exceptions of its own."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        raise InputError(f"{path}: not a usable tokenizer ({one_line(error)}); {AGAIN}") from error


def _check_bytes(text: str, unknown: set[int], path: Path) -> None:
    """Raise InputError for a character that the vocabulary has no token for.

    `tokenizers` would drop it silently (SmolLM2 lacks six control characters and the planes above U+3FFFF).
    """
    if unknown.intersection(text.encode("utf-8")):
        index = next(i for i, character in enumerate(text) if unknown.intersection(character.encode("utf-8")))
        raise InputError(
            f"text: character U+{ord(text[index]):04X} at index {index} has no token in {path}; remove it"
        )


def _without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json with a Metaspace step that prepends nothing."""
    pre_tokenizer = copy.deepcopy(definition.get("pre_tokenizer"))
    for step in flatten(pre_tokenizer):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    return definition | {"pre_tokenizer": pre_tokenizer}
