"""A compiled operation is a claim: it says which Python it stands for, and is compared with it before use.

The Python is whatever stands in the file and in memory at that moment. Where the two differ (a reader changed
the function, or the compiler made a mistake on this processor), the Python runs and one line says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.fast.build import Build
from tinyllama.fast.libraries import BuildError

# The largest relative RMS difference, for each dtype of the activations: parity-method's limits for a whole
# model, far above what a right operation differs by.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(eq=False)
class Claim:
    """That `compiled` computes what `python` does.

    Attributes:
        name: what it is and does: "matrix products run".
        build: the library that the compiled code is in; None if it needs none.
        trials: arguments to try both with.
        python: what it stands for.
        compiled: what runs in its place while it holds.
        holds: whether the last comparison found no difference. False until the library is there.
    """

    name: str
    build: Build | None
    trials: Callable[[], Iterator[tuple[object, ...]]]
    python: Callable[..., Tensor]
    compiled: Callable[..., Tensor]
    holds: bool = False
    _told: str = ""

    @torch.no_grad()
    def check(self, wait: float = 0.0) -> bool:
        """Compare the two, after waiting `wait` seconds for the compiler; whether the claim holds."""
        self.holds = False
        try:
            if self.build is not None and not self.build.ready(wait):
                self._tell("the C compiler is not done yet")
                return False
            for arguments in self.trials():
                expected, got = self.python(*arguments), self.compiled(*arguments)
                if not _agree(got, expected):
                    self._tell("the compiled code differs")
                    return False
        except BuildError as error:
            self._tell(str(error))
            return False
        self.holds = True
        self._told = ""
        return True

    def _tell(self, reason: str) -> None:
        if reason != self._told:
            self._told = reason
            warnings.warn(f"{self.name} as written in Python: {reason}", stacklevel=3)


def _agree(got: Tensor, expected: Tensor) -> bool:
    if not isinstance(expected, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    difference = (got.float() - expected.float()).norm()
    return bool(difference <= LIMITS[got.dtype] * expected.float().norm())
