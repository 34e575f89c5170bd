"""The vocabulary of a tokenizer.json (`tokenizers`).

Two kinds are understood: byte-level BPE, which spells every byte as a printable character (Llama 3, SmolLM2),
and a sentencepiece model written in this format (Llama 2 without its tokenizer.model).
"""

from __future__ import annotations

import copy
import json
from typing import Any

import tokenizers

from tinyllama.checkpoints.files import AGAIN
from tinyllama.errors import InputError
from tinyllama.text.tokenizer_files import TokenizerFiles, flatten
from tinyllama.text.vocabulary import EACH_BYTE, sentencepiece_bytes

SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def byte_spellings() -> dict[int, str]:
    """Byte -> the character that spells it (GPT-2, encoder.py, bytes_to_unicode).

    Printable Latin-1 characters spell themselves, the other bytes get the characters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


SPELLING = byte_spellings()
SPELLED = {character: byte for byte, character in SPELLING.items()}


class JsonVocabulary:
    """A tokenizer.json without its special tokens, which `Tokenizer` splits off beforehand.

    As in `tokenizers` itself, a Metaspace step loses a space at the start of a text.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        assert files.json is not None
        self._path = files.folder / "tokenizer.json"
        decoder = {str(step.get("type")) for step in files.steps("decoder")}
        byte_level = decoder == {"ByteLevel"}
        if not byte_level and not {"ByteFallback"} <= decoder <= SENTENCEPIECE_STEPS:
            raise InputError(
                f"{self._path}: decoder {sorted(decoder)}, expected ByteLevel, or the ByteFallback of a "
                "sentencepiece model: not supported; use another checkpoint"
            )
        self.spells_space = not byte_level
        self.dummy_prefix = bool(decoder & {"Strip", "Metaspace"})
        self.decode_errors = "replace" if byte_level else EACH_BYTE

        # Truncation or padding stored in the file would change texts unasked.
        unwanted: dict[str, Any] = {
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        definition = files.json | unwanted
        self._first = self._later = self._load(definition)
        if self.dummy_prefix and not files.prefixes_every_part():
            self._later = self._load(without_prefix(definition))
        self._ids: dict[str, int] = self._first.get_vocab()
        self._pieces = {index: piece for piece, index in self._ids.items()}
        self.size = max(self._pieces, default=-1) + 1
        self._unknown_bytes = {
            byte for byte in SPELLED.values() if byte_level and SPELLING[byte] not in self._ids
        }
        bos = files.template_bos()
        self.named_tokens = {"bos_token": bos} if bos else {}
        self.adds_bos = bos is not None

    def _load(self, definition: dict[str, Any]) -> tokenizers.Tokenizer:
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise InputError(f"{self._path}: not a tokenizer ({error}); {AGAIN}") from error

    def encode(self, text: str, first: bool) -> list[int]:
        """The ids of a text without special tokens; `first` where nothing precedes it.

        Raises InputError for a character that the vocabulary has no token for: `tokenizers` would drop it
        without a word (SmolLM2 lacks six control characters and the planes above U+3FFFF).
        """
        unknown = self._unknown_bytes.intersection(text.encode("utf-8"))
        if unknown:
            index = next(
                i for i, character in enumerate(text) if unknown.intersection(character.encode("utf-8"))
            )
            raise InputError(
                f"text: character U+{ord(text[index]):04X} at index {index} has no token in {self._path}; "
                "remove it"
            )
        ids: list[int] = (self._first if first else self._later).encode(text, add_special_tokens=False).ids
        return ids

    def find(self, piece: str) -> int | None:
        """The id of a token by its spelling, None where there is none."""
        return self._ids.get(piece)

    def piece(self, index: int) -> str | None:
        """The spelling of a token, None where no token has this id."""
        return self._pieces.get(index)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that an existing token stands for."""
        piece = self._pieces[index]
        if self.spells_space:
            return sentencepiece_bytes(piece)
        if all(character in SPELLED for character in piece):
            return bytes(SPELLED[character] for character in piece)
        return piece.encode("utf-8")


def without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json with a Metaspace step that prepends nothing."""
    pre_tokenizer = copy.deepcopy(definition.get("pre_tokenizer"))
    for step in flatten(pre_tokenizer):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    return definition | {"pre_tokenizer": pre_tokenizer}
