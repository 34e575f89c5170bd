"""The text of a reply while its tokens are chosen, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinyllama.errors import InputError
from tinyllama.generation import TokenStream
from tinyllama.text.tokenizer import Tokenizer


class TextReply(Iterator[str]):
    """The text of a token stream, piece by piece: whole characters, and no part of a stop string.

    Attributes:
        ids: the new ids so far.
        unknown: those of them that the tokenizer does not have, because some models have more ids than
            their tokenizers; they add no text.
        reason: as in `TokenStream`, or "stop" at a stop string, which is left out of the text.
    """

    def __init__(
        self, tokens: TokenStream, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        if not all(stop):
            raise InputError("stop: expected non-empty strings, got ''")
        self.ids: list[int] = []
        self.unknown: list[int] = []
        self.reason: str | None = None
        self._tokens, self._stop, self._held = tokens, stop, ""
        self._text = tokenizer.stream(context)

    def __next__(self) -> str:
        """The next piece, not empty."""
        while self.reason is None:
            token = next(self._tokens, None)
            if token is None:
                self.reason = self._tokens.reason
                self._held += self._text.flush()
            else:
                self.ids.append(token)
                try:
                    self._held += self._text.feed(token)
                except InputError:
                    self.unknown.append(token)
            if piece := self._release():
                return piece
        raise StopIteration

    def rest(self) -> str:
        """The text held back because a stop string may start in it, for a caller who leaves early."""
        piece, self._held = self._held, ""
        return piece

    def _release(self) -> str:
        """Take from the held text all that cannot be the start of a stop string."""
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        keep = 0
        if found:
            self.reason = "stop"
            self._held = self._held[: min(found)]
        elif self.reason is None:
            starts = {stop[:n] for stop in self._stop for n in range(1, len(stop))}
            keep = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece
