"""A prompt taken apart into tokens, and compared with the other ways to ids that people take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tinyllama.text.messages import Message
from tinyllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenRow:
    """One token of a prompt; `bytes` are in hex, `origin` is as in `Token`."""

    position: int
    id: int
    piece: str
    bytes: str
    origin: str


@dataclass(frozen=True)
class Route:
    """Another way to ids, and the first position where they differ from the prompt's (None: nowhere)."""

    name: str
    ids: list[int]
    first_difference: int | None

    def __str__(self) -> str:
        """The difference in words."""
        same = self.first_difference is None
        return f"{self.name}: {'the same ids' if same else f'differs from {self.first_difference} on'}"


@dataclass(frozen=True)
class TakenApart:
    """The text of a prompt, its tokens, and the other routes."""

    text: str
    tokens: list[TokenRow]
    routes: list[Route]


def take_apart(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> TakenApart:
    """Take apart a text, or a chat given as messages."""
    if isinstance(prompt, str):
        text, tokens = prompt, tokenizer.tokens(prompt)
        others = {"without BOS": tokenizer.encode(text, bos=False)}
    else:
        segments = tokenizer.chat_segments(prompt)
        text, tokens = "".join(segment.text for segment in segments), tokenizer.encode_segments(segments)
        others = {
            "rendered, then encoded": tokenizer.encode(text),
            "rendered, then encoded without BOS": tokenizer.encode(text, bos=False),
            "decoded, then encoded again": tokenizer.encode(tokenizer.decode(token.id for token in tokens)),
        }
    ids = [token.id for token in tokens]
    rows = [
        TokenRow(i, id, tokenizer.piece(id), tokenizer.token_bytes(id).hex(" "), origin)
        for i, (id, origin) in enumerate(tokens)
    ]
    routes = [Route(name, other, first_difference(ids, other)) for name, other in others.items()]
    return TakenApart(text, rows, routes)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position where two sequences differ, the end of the shorter one included; None: nowhere."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)
