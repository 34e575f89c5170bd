"""Special tokens in a text: where they are, and how to keep a user from writing one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from tinyllama.errors import InputError


class Segment(NamedTuple):
    """A part of a prompt; `origin` is "special" (one special token), "template" or "text" (a user's)."""

    text: str
    origin: str


class SpecialTokens:
    """The tokens that are split off a text before the vocabulary sees the rest.

    `texts` are all of them. `control` are those with a meaning for the model or its caller (BOS, the end of a
    turn): a chat message must not be able to produce them.
    """

    def __init__(self, texts: Iterable[str], control: Iterable[str]) -> None:
        self.control = sorted(control, key=len, reverse=True)
        self._tokens = re.compile(any_of(map(re.escape, sorted(texts, key=len, reverse=True))))
        self._starts = re.compile(f"(?s:(?={any_of(map(re.escape, self.control))}).)")
        self._longest = max(map(len, self.control), default=0)

    def split(self, text: str, origin: str) -> list[Segment]:
        """The text cut into special tokens and the parts of `origin` between them, without empty parts."""
        segments = []
        end = 0
        for match in self._tokens.finditer(text):
            segments += [Segment(text[end : match.start()], origin), Segment(match[0], "special")]
            end = match.end()
        segments.append(Segment(text[end:], origin))
        return [segment for segment in segments if segment.text]

    def hide(self, text: str, mask: dict[str, str]) -> str:
        """Replace, by their masks, the characters with which `text` would begin or continue a control token.

        That covers the tokens inside the text, and those that it would form with the template's text beside
        it: a message "</" before the template's "s>".
        """
        text = self._mask_starts(text, mask)
        core = text.strip()  # what a template that trims would keep
        hidden = self._mask_starts(core, mask)
        if core and any(continues(core, token) for token in self.control):
            hidden = mask.get(hidden[0], hidden[0]) + hidden[1:]
        return text.replace(core, hidden, 1)

    def _mask_starts(self, text: str, mask: dict[str, str]) -> str:
        """Mask the characters at which a control token begins, or may begin and go on beyond the text."""
        masked = list(self._starts.sub(lambda match: mask[match[0]], text))
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(token.startswith(text[at:]) for token in self.control):
                masked[at] = mask[text[at]]
        return "".join(masked)


def any_of(patterns: Iterable[str]) -> str:
    """A regular expression that matches any of the patterns; without patterns it never matches."""
    return "|".join(patterns) or "(?!)"


def continues(text: str, token: str) -> bool:
    """Whether a token that begins before `text` could continue into it."""
    rests = (token[start:] for start in range(1, len(token)))
    return any(text.startswith(rest) or rest.startswith(text) for rest in rests)


def check_text(text: str, where: str) -> None:
    """Raise InputError for another type than str, or a lone surrogate, which UTF-8 cannot express."""
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a str, got {type(text).__name__}; decode bytes as UTF-8 first")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: lone surrogate U+{ord(text[error.start]):04X} at index {error.start}, which is no "
            "character; remove it"
        ) from error
