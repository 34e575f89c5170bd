"""What a token stands for, and the vocabulary of a tokenizer.model (`sentencepiece`).

Every Llama vocabulary is a byte-pair encoding in which each token stands for some bytes, and a text is the
bytes of its tokens joined. `json_vocabulary.py` reads the other kind, tokenizer.json.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor

from tinyllama.checkpoints.files import AGAIN
from tinyllama.errors import InputError
from tinyllama.text.tokenizer_files import TokenizerFiles

SPACE = "▁"  # U+2581, how sentencepiece spells a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")

# A serialized ModelProto{normalizer_spec{add_dummy_prefix: false}}. Protobuf merges a message that occurs
# twice, so a model file with this appended is the same model without the dummy prefix.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of either kind, without special tokens: `Tokenizer` splits those off beforehand.

    Attributes:
        pieces: id -> the token as the vocabulary spells it.
        piece_bytes: such a spelling -> the bytes that the token stands for.
        encode: (text, first) -> ids; `first` is true where no other text precedes it.
        spells_space: whether "▁" in a piece or a text is a space.
        dummy_prefix: whether encoding puts a space before the text, so that decoding drops it.
        decode_errors: the codec error handler, which decides how many U+FFFD an invalid sequence becomes.
        adds_bos: whether a text begins with BOS if tokenizer_config.json does not say.
        named_tokens: the vocabulary's own "bos_token", "eos_token", "unk_token" and "pad_token".
    """

    pieces: dict[int, str]
    piece_bytes: Callable[[str], bytes]
    encode: Callable[[str, bool], list[int]]
    spells_space: bool
    dummy_prefix: bool
    decode_errors: str
    adds_bos: bool
    named_tokens: dict[str, str]


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


def sentencepiece_vocabulary(files: TokenizerFiles) -> Vocabulary:
    """The vocabulary of a tokenizer.model (Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226).

    The one character that does not survive encoding is "▁" itself: sentencepiece takes it for a space.

    Raises:
        InputError: the file is no such model, or is cut off.
    """
    assert files.model is not None
    path = files.folder / "tokenizer.model"
    try:
        processor = SentencePieceProcessor(model_proto=files.model)
        without_prefix = SentencePieceProcessor(model_proto=files.model + NO_DUMMY_PREFIX)
        pieces: list[str] = processor.id_to_piece(list(range(processor.vocab_size())))
    except (RuntimeError, ValueError) as error:  # ValueError: a piece is not UTF-8
        raise InputError(f"{path}: not a sentencepiece model; {AGAIN}") from error
    # A file cut off after its last piece still loads, but with sentencepiece's default normalizer.
    if processor.decode(processor.encode("  ")) != "  ":
        raise InputError(f"{path}: loses spaces, so it is cut off or not a Llama's; {AGAIN}")
    prefixes_every_part = files.prefixes_every_part()

    def encode(text: str, first: bool) -> list[int]:
        ids: list[int] = (processor if first or prefixes_every_part else without_prefix).encode(text)
        return ids

    named = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    return Vocabulary(
        pieces=dict(enumerate(pieces)),
        piece_bytes=sentencepiece_bytes,
        encode=encode,
        spells_space=True,
        dummy_prefix=True,
        decode_errors=EACH_BYTE,
        adds_bos=files.json is None or files.template_bos() is not None,
        named_tokens={name: pieces[index] for name, index in named.items() if index >= 0},
    )
