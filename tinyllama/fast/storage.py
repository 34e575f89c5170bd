"""How a model keeps its matrices in memory: exactly as it computes, or in fewer bits for speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.errors import InputError
from tinyllama.fast import native
from tinyllama.fast.linear import FastLinear, Int8Linear, quantise
from tinyllama.fast.native import GROUP

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("exact", "stored", *FLOATS, "int8")


@dataclass(frozen=True)
class Storage:
    """What becomes of a checkpoint's tensors.

    Attributes:
        kind: see `load_model`.
        dtype: of the activations.
    """

    kind: str
    dtype: torch.dtype

    @staticmethod
    def of(kind: str, dtype: torch.dtype, device: torch.device) -> Storage:
        """That kind; for "stored", which asks for speed alone, "exact" where there is none to be had.

        Raises:
            InputError: there is no such kind.
        """
        if kind not in KINDS:
            raise InputError(f"weights: expected one of {', '.join(KINDS)}, got {kind!r}")
        slow = device.type != "cpu" or dtype == torch.float64
        if kind == "stored" and (slow or not native.available()):
            kind = "exact"
        return Storage(kind, dtype)

    def dtype_of(self, shape: tuple[int, ...], stored: torch.dtype) -> torch.dtype:
        """What a tensor is read as."""
        if self.kind == "exact" or len(shape) < 2:
            return self.dtype
        if self.kind in FLOATS:
            return FLOATS[self.kind]
        return min(self.dtype, stored, key=lambda dtype: dtype.itemsize)

    def itemsize(self, stored: torch.dtype) -> float:
        """Bytes that a weight of a matrix takes in memory."""
        return 1 + 2 / GROUP if self.kind == "int8" else self.dtype_of((1, 1), stored).itemsize

    def linear(self, weight: Tensor) -> FastLinear:
        """The layer that keeps such a matrix; not for "exact".

        Raises:
            InputError: its rows cannot be divided into groups.
        """
        if self.kind != "int8":
            return FastLinear(weight)
        if weight.shape[1] % GROUP:
            raise InputError(
                f"weights: int8 needs rows that are a multiple of {GROUP}, got {weight.shape[1]}; use stored"
            )
        return Int8Linear(*quantise(weight))
