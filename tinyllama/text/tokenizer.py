"""Text <-> ids.

A text is cut at its special tokens, and the vocabulary encodes each part between them on its own. To decode,
the bytes that the ids stand for are joined and read as UTF-8. Whose ids these are:

- With a tokenizer.model: BOS, then for each part the ids of `sentencepiece`, which puts a space (the dummy
  prefix) before the part. transformers 4 gives the same ids. `sentencepiece` alone knows no special tokens:
  it spells "</s>" with three pieces.
- transformers 5 builds its own tokenizer from a tokenizer.model and gives other ids in two cases: a text that
  starts with a space gets no dummy prefix (" " is 29871 there, 259 here), and it splits some runs of two
  spaces differently. Of 10,000 odd strings 301 differed in this way.
- With `legacy: false` in tokenizer_config.json only the first part of a text gets the dummy prefix, here and
  in transformers 5: "</s>" and a newline are 2, 13. Otherwise every part gets one: 2, 29871, 13.
- With a tokenizer.json alone: the ids of the `tokenizers` library, and so of transformers 4 and 5. A
  character without a token is refused here and dropped there.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from tinyllama.advice import OF_A_TOKENIZER, no_such_name
from tinyllama.errors import InputError
from tinyllama.text.chat import render_chat
from tinyllama.text.json_vocabulary import json_vocabulary
from tinyllama.text.messages import Message
from tinyllama.text.special_tokens import Segment, SpecialTokens, check_text
from tinyllama.text.tokenizer_files import TokenizerFiles
from tinyllama.text.vocabulary import SPACE, sentencepiece_vocabulary

if TYPE_CHECKING:
    from tinyllama.text.routes import TakenApart

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Token(NamedTuple):
    """One id of a prompt; `origin` is "special", "template" or "text" (a user's)."""

    id: int
    origin: str


class Tokenizer:
    """Text <-> ids for one checkpoint.

    Attributes:
        vocab_size: highest id + 1, added tokens included.
        bos_id, eos_id, pad_id: None if the checkpoint names no such token.
        special_ids: the ids that `skip_special` leaves out of a decoded text.
        chat_template: jinja2 source, None if the checkpoint is not a chat model.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        vocabulary = sentencepiece_vocabulary(files) if files.model else json_vocabulary(files)
        spelled = {piece: index for index, piece in vocabulary.pieces.items()}
        added = files.added_tokens()
        ids = {text: index for text, (index, _) in added.items()}
        names = {}
        for name in NAMED_TOKENS:
            text = files.named_token(name, vocabulary.named_tokens.get(name))
            if text is None:
                continue
            index = ids.get(text, spelled.get(text))
            if index is None:
                raise files.config_error(f"{name} is {text!r}, which is not in the vocabulary")
            ids[text] = index
            names[name] = text
        adds_bos = files.setting("add_bos_token")
        if files.setting("add_eos_token"):
            raise files.config_error("add_eos_token is true, which is not supported")
        if adds_bos and "bos_token" not in names:
            raise files.config_error("add_bos_token is true, but there is no bos_token")

        control = {text for text, (_, special) in added.items() if special} | set(names.values())
        self.bos_id = ids.get(names.get("bos_token", ""))
        self.eos_id = ids.get(names.get("eos_token", ""))
        self.pad_id = ids.get(names.get("pad_token", ""))
        self.special_ids = frozenset(ids[text] for text in control)
        self.vocab_size = max([*vocabulary.pieces, *ids.values()]) + 1
        self.chat_template = files.chat_template
        self._folder = files.folder
        self._vocabulary = vocabulary
        self._ids = ids
        self._texts = {index: text for text, index in ids.items()}
        self._pieces = vocabulary.pieces | self._texts
        self._names = names
        self._special = SpecialTokens(ids, control)
        self._adds_bos = vocabulary.adds_bos if adds_bos is None else adds_bos

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.model if there is one, otherwise tokenizer.json.

        Raises InputError for files that are missing, damaged, or ask for something that is not supported.
        """
        return cls(TokenizerFiles.read(Path(folder)))

    @property
    def name(self) -> str:
        """Of its folder, which has the model's name."""
        return self._folder.name

    def __repr__(self) -> str:
        """What a reader wants to know first: `print(tokenizer)`."""
        special = {name.removesuffix("_token"): (text, self._ids[text]) for name, text in self._names.items()}
        return (
            f"Tokenizer({self.name}, vocab_size={self.vocab_size}, special={special}, "
            f"adds_bos={self._adds_bos}, chat_template={'yes' if self.chat_template else 'no'})"
        )

    def __call__(self, *_texts: object, **_settings: object) -> NoReturn:
        """Refused with the call that gives ids here: transformers' tokenizers are called."""
        raise InputError(
            "tokenizer: is not called, expected ids = tokenizer.encode(text), and model(torch.tensor([ids]))"
        )

    def __getattr__(self, name: str) -> NoReturn:
        """A name that only transformers' tokenizers have is told what it is here."""
        raise no_such_name(self, name, OF_A_TOKENIZER)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text, after BOS if the model expects one; special tokens in the text are recognised.

        Raises InputError for a lone surrogate, or a character that the vocabulary has no tokens for.
        """
        return [token.id for token in self.tokens(text, bos)]

    def tokens(self, text: str, bos: bool = True) -> list[Token]:
        """The ids that `encode` gives, each with its origin."""
        check_text(text, "text")
        begin = [Token(self.bos_id, "special")] if bos and self._adds_bos and self.bos_id is not None else []
        return begin + self.encode_segments(self._special.split(text, "text"))

    def explain(self, prompt: str | Sequence[Message]) -> TakenApart:
        """A text, or a chat given as messages, taken apart; in a notebook or a terminal it shows as a table.

        Raises InputError as `encode` and `chat` do.
        """
        from tinyllama.text.routes import take_apart  # here, because routes.py imports this file

        return take_apart(self, prompt)

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, strict: bool = False
    ) -> list[int]:
        """The prompt ids of a chat; the only BOS is one that the template writes.

        These are the ids of transformers' `apply_chat_template`, except that special tokens in a message stay
        text. Role markers (`<|user|>` in TinyLlama) are text in any case, so one in a message causes a
        `RoleMarkerWarning`, or an InputError if `strict`. See `render_chat`.
        """
        segments = self.chat_segments(messages, add_generation_prompt, strict)
        return [token.id for token in self.encode_segments(segments)]

    def chat_segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, strict: bool = False
    ) -> list[Segment]:
        """The text that `chat` encodes, in segments with one origin each."""
        if self.chat_template is None:
            raise InputError(
                f"{self._folder}: no chat template, expected one in chat_template.jinja or "
                "tokenizer_config.json; use a chat model, or a plain prompt"
            )
        return render_chat(
            self.chat_template, messages, self._special, self._names, add_generation_prompt, strict
        )

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD.

        Raises InputError for an id that is not in the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.feed, ids), stream.flush()])

    def stream(self, context: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """A decoder for ids that come one by one after the ids in `context`."""
        return TextStream(self, context, skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token contributes to a text; a special token contributes its name."""
        piece = self.piece(id)
        return piece.encode("utf-8") if id in self._texts else self._vocabulary.piece_bytes(piece)

    def piece(self, id: int) -> str:
        """A token as the vocabulary spells it: "▁Hello", "<0x0A>", "Ġworld"."""
        if id not in self._pieces:
            raise InputError(
                f"id {id} is not in the vocabulary of {self._folder}, expected 0 to {self.vocab_size - 1}; "
                "use the ids of this model"
            )
        return self._pieces[id]

    def encode_segments(self, segments: Sequence[Segment]) -> list[Token]:
        """The ids of a text in segments, with their origins; a token with bytes of both origins is "text"."""
        tokens: list[Token] = []
        for special, group in groupby(segments, key=lambda segment: segment.origin == "special"):
            if special:
                tokens += [Token(self._ids[segment.text], "special") for segment in group]
            else:
                tokens += self._encode_part(list(group), first=not tokens)
        return tokens

    def _encode_part(self, segments: list[Segment], first: bool) -> list[Token]:
        """Encode the text between two special tokens; a token may have bytes of two segments."""
        ids = self._vocabulary.encode("".join(segment.text for segment in segments), first)
        if len(segments) == 1:
            return [Token(index, segments[0].origin) for index in ids]
        origins: list[str] = []  # of every byte
        for segment in segments:
            text = segment.text.replace(SPACE, " ") if self._vocabulary.spells_space else segment.text
            origins += [segment.origin] * len(text.encode("utf-8"))
        lengths = [len(self.token_bytes(index)) for index in ids]
        start = len(origins) - sum(lengths)  # -1 if there is a dummy prefix
        tokens = []
        for index, length in zip(ids, lengths, strict=True):
            covered = origins[max(start, 0) : max(start + length, 1)]
            tokens.append(Token(index, "text" if "text" in covered else "template"))
            start += length
        return tokens


class TextStream:
    """Decodes ids one by one. The texts that `feed` and `flush` return, joined, are what `decode` gives.

    A character that comes in several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._drops_space = tokenizer._vocabulary.dummy_prefix
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer._vocabulary.decode_errors)
        for id in context:
            self.feed(id)

    def feed(self, id: int) -> str:
        """The text that this id completes, possibly none; raises InputError for an unknown id."""
        try:
            id = operator.index(id)
        except TypeError as error:
            raise InputError(
                f"decode: expected ids, got {type(id).__name__}; of several rows decode one: decode(rows[0])"
            ) from error
        data = self._tokenizer.token_bytes(id)
        if id in self._skipped:
            return ""
        # The first space is the dummy prefix, unless it is a byte token or part of a special token.
        if self._drops_space and self._tokenizer.piece(id).startswith(SPACE):
            data = data[1:]
        self._drops_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The text of the bytes still held back: U+FFFD, since their character is incomplete."""
        return self._utf8.decode(b"", final=True)
