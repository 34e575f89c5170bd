"""Tensors to the compiled operations and back: shape, dtype, device and contiguity are checked here."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tinyllama.fast import build, compiler
from tinyllama.fast.build import GROUP

# What weights and activations can be.
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
ACTIVATIONS = (torch.float32, torch.bfloat16)
# matvec.c serves up to this many vectors: there they cost little more than reading the weights once. matmul.c
# serves more (measured: docs/performance-log.md, "Matrix products").
FEW = 32
# Processor instructions with which PyTorch multiplies bfloat16 matrices faster than matmul.c: x86-64, ARM.
BFLOAT16_MATRICES = {"amx_bf16", "bf16"}

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
ARGUMENTS: dict[str, list[type[Any]]] = {
    **dict.fromkeys(["matvec", "matvec_plain"], [_POINTER] * 4 + [_LONG] * 3),
    "matmul": [_POINTER] * 5 + [_LONG] * 3,
    "packed_size": [_LONG] * 2,
    **dict.fromkeys(["rms_norm", "rms_norm_plain"], [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT]),
}


@cache
def pytorch_is_faster(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies many vectors of that dtype faster here than matmul.c does."""
    return dtype == torch.bfloat16 and bool(
        BFLOAT16_MATRICES.intersection(compiler.processor_flags().split())
    )


def linear(weight: Tensor, scales: Tensor | None, x: Tensor, *, plain: bool = False) -> Tensor:
    """Y = W x for every vector in x; sums are float32.

    Up to FEW vectors have the same bits alone and together.

    Args:
        weight: (rows, cols) on the CPU, contiguous, in one of WEIGHTS; cols is a multiple of GROUP.
        scales: for int8, (rows, cols / GROUP) in bfloat16, contiguous; None otherwise.
        x: (..., cols) in float32 or bfloat16. Where it is bfloat16 and the processor multiplies such numbers,
            W is rounded to them.
        plain: take the loop that says what is computed, not the fast one.

    Returns:
        (..., rows) in the dtype of x.

    Raises:
        ValueError: the tensors do not fit each other or this code.
    """
    rows, cols = weight.shape
    *others, width = x.shape
    if not (
        width == cols
        and cols > 0
        and cols % GROUP == 0
        and weight.dtype in WEIGHTS
        and x.dtype in ACTIVATIONS
        and (weight.is_cpu and x.is_cpu)
        and weight.is_contiguous()
        and (scales is None) == (weight.dtype != torch.int8)
    ):
        raise ValueError(f"cannot multiply {describe(weight)} with {describe(x)}")
    place = None
    if scales is not None:
        if not (
            scales.shape == (rows, cols // GROUP)
            and scales.dtype == torch.bfloat16
            and scales.is_cpu
            and scales.is_contiguous()
        ):
            raise ValueError(f"scales do not fit {describe(weight)}: {describe(scales)}")
        place = scales.data_ptr()
    x = x.contiguous()
    y = torch.empty((*others, rows), dtype=x.dtype)
    n = x.numel() // cols
    library = build.products(weight.dtype, x.dtype)
    if plain or n <= FEW:
        matvec = _call(library, "matvec_plain" if plain else "matvec")
        matvec(weight.data_ptr(), place, x.data_ptr(), y.data_ptr(), rows, cols, n)
    else:
        packed = _room.floats(_call(library, "packed_size")(cols, n))
        matmul = _call(library, "matmul")
        matmul(weight.data_ptr(), place, x.data_ptr(), packed.data_ptr(), y.data_ptr(), rows, cols, n)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plain: bool = False) -> Tensor:
    """X / rms(x) * weight over the last axis, computed in float32.

    Args:
        x: (..., C) in float32 or bfloat16.
        weight: (C,) in the dtype of x.
        eps: added to the mean of the squares.
        plain: take the loop that says what is computed, not the fast one.

    Raises:
        ValueError: the tensors do not fit each other or this code.
    """
    C = x.shape[-1] if x.dim() else 0
    if not (
        weight.shape == (C,)
        and C > 0
        and weight.dtype == x.dtype
        and x.dtype in ACTIVATIONS
        and (x.is_cpu and weight.is_cpu)
        and weight.is_contiguous()
    ):
        raise ValueError(f"cannot normalise {describe(x)} by {describe(weight)}")
    x = x.contiguous()
    y = torch.empty_like(x)
    function = _call(build.norm(x.dtype), "rms_norm_plain" if plain else "rms_norm")
    function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // C, C, eps)
    return y


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


class _Room(threading.local):
    """Memory that is kept from call to call: fresh memory costs more than packing does."""

    held = torch.empty(0)

    def floats(self, size: int) -> Tensor:
        """At least `size` floats, whose values do not matter."""
        if self.held.numel() < size:
            self.held = torch.empty(size)
        return self.held


_room = _Room()


def _call(library: build.Build, name: str) -> Callable[..., int]:
    """The C function of that name; the library is ready."""
    function = library.functions.get(name)
    if function is None:
        function = library.functions[name] = library.function(name)
        function.argtypes = ARGUMENTS[name]
        function.restype = _LONG if name == "packed_size" else None
    return function
