"""A prompt taken apart into tokens, and compared with the other ways to ids that people take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tinyllama.pages import cell
from tinyllama.progress import escape, printed
from tinyllama.text.messages import Message
from tinyllama.text.pieces import characters
from tinyllama.text.tokenizer import Tokenizer

STYLES = {"special": "magenta", "template": "cyan", "text": ""}
ABOVE = "↑"


@dataclass(frozen=True)
class TokenRow:
    """One token of a prompt.

    Attributes:
        position: in the prompt.
        id: of the token.
        piece: as the vocabulary spells it.
        bytes: those that it stands for, in hex.
        origin: as in `Token`.
        text: the characters that end in it; a character of several tokens is with the first of them, and the
            others have none.
    """

    position: int
    id: int
    piece: str
    bytes: str
    origin: str
    text: str


COLUMNS = [field.name for field in fields(TokenRow)]


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
    """The text of a prompt, its tokens, and the other routes; shown as a table."""

    text: str
    tokens: list[TokenRow]
    routes: list[Route]

    def show(self, console: Console) -> None:
        """Print the tokens as a table and the other routes below it."""
        numbers = (Column(name, justify="right") for name in COLUMNS[:2])
        table = Table(*numbers, *COLUMNS[2:])
        for row, cells in zip(self.tokens, self._cells(), strict=True):
            # Text objects: in a plain string, rich would read [brackets] as markup.
            table.add_row(*(Text(escape(str(cell))) for cell in cells), style=STYLES[row.origin])
        console.print(table)
        for route in self.routes:
            console.print(Text(str(route), style="bold"))
            console.print(Text(" ".join(map(str, route.ids))))

    def __repr__(self) -> str:
        """The table, for a terminal or a notebook without HTML."""
        return printed(self.show)

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        title = "; ".join([f"{len(self.tokens)} tokens", *map(str, self.routes)])
        return cell.table(title, [f"#{name}" for name in COLUMNS[:2]] + COLUMNS[2:], self._cells())

    def _cells(self) -> list[tuple[Any, ...]]:
        """What the table shows of each token; a token that completes the character above points there."""
        return [(*astuple(row)[:-1], row.text or ABOVE) for row in self.tokens]


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
        TokenRow(i, id, tokenizer.piece(id), tokenizer.token_bytes(id).hex(" "), origin, shown)
        for i, ((id, origin), (shown, _)) in enumerate(zip(tokens, characters(ids, tokenizer), strict=True))
    ]
    routes = [Route(name, other, first_difference(ids, other)) for name, other in others.items()]
    return TakenApart(text, rows, routes)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position where two sequences differ, the end of the shorter one included; None: nowhere."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)
