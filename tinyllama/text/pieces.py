"""Tokens beside the characters they form: one character may be several tokens, as 你 often is."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama.errors import InputError
from tinyllama.text.tokenizer import Tokenizer


def characters(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """The text of each token and how many tokens make it: a character of several is with the first."""
    stream = tokenizer.stream(skip_special=False)
    found: list[tuple[str, int]] = []
    begun = 0
    for index, id in enumerate(ids):
        try:
            piece = stream.feed(id)
        except InputError:  # a model may have more ids than its tokenizer
            piece = spelt(tokenizer, id)[0]
        found.append(("", 0))
        if piece or index == len(ids) - 1:
            found[begun] = (piece + (stream.flush() if index == len(ids) - 1 else ""), index + 1 - begun)
            begun = index + 1
    return found


def spelt(tokenizer: Tokenizer, id: int) -> tuple[str, bytes]:
    """A token's piece and bytes; of an id that the tokenizer does not have its number and no bytes."""
    try:
        return tokenizer.piece(id), tokenizer.token_bytes(id)
    except InputError:
        return f"<{id}>", b""
