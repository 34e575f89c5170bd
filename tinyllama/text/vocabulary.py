"""What a token stands for, and the vocabulary of a tokenizer.model (`sentencepiece`).

Every Llama vocabulary is a byte-pair encoding in which each token stands for a run of bytes; a text is the
bytes of its tokens, one after the other. `json_vocabulary.py` has the other kind, tokenizer.json.
"""

from __future__ import annotations

import codecs
import re
from typing import Protocol

from sentencepiece import SentencePieceProcessor

from tinyllama.checkpoints.files import AGAIN
from tinyllama.errors import InputError
from tinyllama.text.tokenizer_files import TokenizerFiles

SPACE = "▁"  # U+2581, how sentencepiece spells a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")

# A serialized ModelProto{normalizer_spec{add_dummy_prefix: false}}. Protobuf merges a message that occurs
# twice, so a model file with this appended is the same model without the dummy prefix.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Vocabulary(Protocol):
    """What `Tokenizer` asks of either kind. Special tokens are not its business."""

    size: int  # highest id + 1
    spells_space: bool  # "▁" in a piece, or in a text, is a space
    dummy_prefix: bool  # encoding puts a space before the text, so decoding drops it
    decode_errors: str  # codec error handler: how many U+FFFD an invalid sequence becomes
    adds_bos: bool
    named_tokens: dict[str, str]  # the vocabulary's own "bos_token" and its like

    def encode(self, text: str, first: bool) -> list[int]:
        """The ids of a text without special tokens; `first` where nothing precedes it."""

    def find(self, piece: str) -> int | None:
        """The id of a token by its spelling, None where there is none."""

    def piece(self, index: int) -> str | None:
        """The spelling of a token, None where no token has this id."""

    def token_bytes(self, index: int) -> bytes:
        """The bytes that an existing token stands for."""


def replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each invalid byte, as sentencepiece has it ("replace" gives one per sequence)."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


EACH_BYTE = "tinyllama.replace_each_byte"
codecs.register_error(EACH_BYTE, replace_each_byte)


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece piece: "<0x0A>" is one byte, "▁" a space."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode("utf-8")


class SentencePieceVocabulary:
    """A tokenizer.model (Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226).

    The one character that does not survive encoding is "▁" itself: sentencepiece takes it for a space.
    """

    spells_space = True
    dummy_prefix = True
    decode_errors = EACH_BYTE

    def __init__(self, files: TokenizerFiles) -> None:
        assert files.model is not None
        path = files.folder / "tokenizer.model"
        try:
            self._processor = SentencePieceProcessor(model_proto=files.model)
            self._without_prefix = SentencePieceProcessor(model_proto=files.model + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise InputError(f"{path}: not a sentencepiece model; {AGAIN}") from error
        # A file cut off after its last piece still loads, but with sentencepiece's default normalizer.
        if self._processor.decode(self._processor.encode("  ")) != "  ":
            raise InputError(f"{path}: loses spaces, so it is cut off or not a Llama's; {AGAIN}")
        self._prefixes_every_part = files.prefixes_every_part()
        self.adds_bos = files.json is None or files.template_bos() is not None
        self.size: int = self._processor.vocab_size()
        named = {
            "bos_token": self._processor.bos_id(),
            "eos_token": self._processor.eos_id(),
            "unk_token": self._processor.unk_id(),
            "pad_token": self._processor.pad_id(),
        }
        self.named_tokens = {
            name: self._processor.id_to_piece(index) for name, index in named.items() if index >= 0
        }

    def encode(self, text: str, first: bool) -> list[int]:
        """The ids of a text without special tokens; `first` where nothing precedes it."""
        processor = self._processor if first or self._prefixes_every_part else self._without_prefix
        ids: list[int] = processor.encode(text)
        return ids

    def find(self, piece: str) -> int | None:
        """The id of a token by its spelling, None where there is none."""
        # sentencepiece answers the id of <unk> for what it does not know.
        index: int = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    def piece(self, index: int) -> str | None:
        """The spelling of a token, None where no token has this id."""
        return self._processor.id_to_piece(index) if index < self.size else None

    def token_bytes(self, index: int) -> bytes:
        """The bytes that an existing token stands for."""
        return sentencepiece_bytes(self._processor.id_to_piece(index))
