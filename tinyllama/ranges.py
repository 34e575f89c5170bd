"""Numbers of layers and heads as people write them: `0-3,7`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinyllama.errors import InputError


def numbers(text: str, where: str = "") -> tuple[int, ...]:
    """`0-3,7` as (0, 1, 2, 3, 7); raises InputError for anything else, which begins with `where`."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise InputError(f"{where}expected numbers such as 0-3,7, got {text!r:.80}")
        found.update(span)
    return tuple(sorted(found))


def ranges(numbers: Sequence[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
