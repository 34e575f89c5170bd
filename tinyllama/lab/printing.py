"""`print` for a user's kernel file: it runs in every layer of every pass, and stdout has the results."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch

from tinyllama.progress import note

SHOWN = 5  # of each line of code that prints


class Printer:
    """Takes the place of `print`: each line of code prints its first few values, to stderr."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()

    def __call__(
        self,
        *values: Any,
        sep: str | None = None,
        end: str | None = None,
        file: Any = None,
        flush: bool = False,
    ) -> None:
        """As `print`, with the file and line in front; where a file is given, it is `print`."""
        if file is not None:
            print(*values, sep=sep, end=end, file=file, flush=flush)
            return
        if torch.compiler.is_compiling():  # the compiler has no print
            return
        code = sys._getframe(1)
        place = f"{code.f_code.co_filename}:{code.f_lineno}"
        self.times[place] += 1
        if self.times[place] <= SHOWN:
            note(f"{place}: {(' ' if sep is None else sep).join(map(str, values))}")
        elif self.times[place] == SHOWN + 1:
            note(f"{place}: prints more, which is left out")
