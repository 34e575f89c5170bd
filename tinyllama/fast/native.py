"""The compiled operations of matvec.c, matmul.c and step.c: built once on each machine, in a few seconds."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.device import CPUINFO

HOME = Path(__file__).parent / "csrc"
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
# What weights can be, and activations; and for each C file, each pair of them that it is compiled for.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
STEP_DTYPES = (torch.float32, torch.bfloat16)
# The longest first.
BUILDS = [
    *product(["step"], [None], STEP_DTYPES),
    *product(["matmul", "matvec"], DTYPES, STEP_DTYPES),
]

# Up to so many vectors at once go through matvec.c, where their cost is little more than that of reading the
# weights, and more through matmul.c (python scripts/bench.py --products).
FEW = 32
# Products take rows whose length is a multiple of this; 8-bit weights have a scale for as many.
GROUP = 64
# matmul.c packs at most so many vectors at once, in panels of 32 or of a half or a quarter of that.
VECTORS, PANEL = 512, 32
# step.c takes heads whose size is a multiple of this.
LANES = 16
# How processors call the instructions for products of bfloat16 numbers with which PyTorch's is the faster:
# x86-64's for matrices and ARM's.
MATRICES_OF_BFLOAT16 = {"amx_bf16", "bf16"}

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
ARGUMENTS: dict[str, list[type[Any]]] = {
    "matvec": [_POINTER] * 4 + [_LONG] * 3,
    "matmul": [_POINTER] * 6 + [_LONG] * 3,
    "rms_norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT],
    "attend": [_POINTER] * 9 + [_LONG] * 7 + [_FLOAT],
    "swiglu": [_POINTER] * 3 + [_LONG],
    "layer": [_POINTER] * 14 + [_LONG] * 9 + [_POINTER, _FLOAT],
}


@cache
def available() -> bool:
    """Whether they can be used here; the first time they cannot, a warning says why."""
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_library, *zip(*BUILDS, strict=True)))
    except (OSError, subprocess.SubprocessError) as error:
        (reason, *_) = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"no compiled matrix products: {reason}; PyTorch's own are used, at about half the speed "
            "(gcc is what is needed)",
            stacklevel=2,
        )
        return False
    return True


@cache
def pytorch_is_faster(dtype: torch.dtype) -> bool:
    """Whether matrices of that dtype are better multiplied by PyTorch here than by matmul.c."""
    return dtype == torch.bfloat16 and _has(MATRICES_OF_BFLOAT16)


def linear(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
    """W x for every vector in x, by the product that is best at so many; arguments as for those.

    x, and the result, may be in float16 as well.
    """
    product = matvec if few(x.numel() // weight.shape[1]) else matmul
    return product(weight, scales, x if x.dtype in STEP_DTYPES else x.float()).to(x.dtype)


def few(n: int) -> bool:
    """Whether so many vectors are best multiplied by matvec.c."""
    return n <= FEW


def matvec(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
    """W x for every vector in x, with float32 sums.

    Args:
        weight: (rows, cols), contiguous, in float32, bfloat16, float16 or int8; cols is a multiple of 64.
        scales: for int8, (rows, cols / 64) in bfloat16; None otherwise.
        x: (..., cols), contiguous, in float32 or bfloat16. To the latter W is rounded as well, where the
            processor multiplies such numbers.

    Returns:
        (..., rows) in the dtype of x. A vector's bits are the same alone and among others.
    """
    rows, cols = weight.shape
    y = x.new_empty(*x.shape[:-1], rows)
    place = None if scales is None else scales.data_ptr()
    _operation("matvec", weight.dtype, x.dtype)(
        weight.data_ptr(), place, x.data_ptr(), y.data_ptr(), rows, cols, x.numel() // cols
    )
    return y


class _Room(threading.local):
    """Memory that is kept from call to call, for getting it anew takes a while."""

    floats = torch.empty(0)

    def of(self, size: int) -> Tensor:
        """Room for so many floats, of no particular value."""
        if self.floats.numel() < size:
            self.floats = torch.empty(size)
        return self.floats


_room = _Room()


def _packed(n: int, cols: int) -> int:
    """How many floats matmul.c needs for n vectors."""
    return -(-min(n, VECTORS) // PANEL) * PANEL * cols


def matmul(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
    """As `matvec`, for many vectors: faster, but a vector's bits are not those that it would have there."""
    rows, cols = weight.shape
    n = x.numel() // cols
    y = x.new_empty(*x.shape[:-1], rows)
    packed = _room.of(_packed(n, cols))
    place = None if scales is None else scales.data_ptr()
    w, scale, out = ((_POINTER * 1)(one) for one in (weight.data_ptr(), place, y.data_ptr()))
    _operation("matmul", weight.dtype, x.dtype)(
        w, scale, x.data_ptr(), packed.data_ptr(), out, (_LONG * 1)(rows), 1, cols, n
    )
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, x / rms(x) * weight, computed in float32.

    Args:
        x: (..., C), contiguous, in float32 or bfloat16.
        weight: (C,), in the dtype of x.
        eps: added to the mean of the squares.
    """
    y = torch.empty_like(x)
    C = weight.shape[0]
    _operation("rms_norm", None, x.dtype)(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // C, C, eps
    )
    return y


def attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """RoPE, the KV cache's write, and softmax(q k^T / sqrt(D)) v: each token sees the slots up to its own.

    All are contiguous and, but for the positions, of one dtype: float32 or bfloat16.

    Args:
        q: (B, T, H * D), before RoPE; D is a multiple of 16.
        k: (B, T, K * D), before RoPE.
        v: (B, T, K * D).
        cos: (B, 1, T, D/2).
        sin: (B, 1, T, D/2).
        positions: (B, T), the slots; -1 for padding, which stores nothing and gets zeros.
        keys: (B, K, slots, D), one layer's.
        values: (B, K, slots, D).

    Returns:
        (B, T, H, D). A token's bits are the same alone and among others, of which a row may have 31.
    """
    (B, T, width), (_, K, slots, D) = q.shape, keys.shape
    z = q.new_empty(B, T, width // D, D)
    pointers = [tensor.data_ptr() for tensor in (q, k, v, cos, sin, positions, keys, values, z)]
    _require_slots(
        _operation("attend", None, q.dtype)(*pointers, B, T, 0, width // D, K, D, slots, D**-0.5), slots
    )
    return z


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both contiguous and in float32 or bfloat16."""
    y = torch.empty_like(gate)
    _operation("swiglu", None, gate.dtype)(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
    return y


def layer(
    x: Tensor,
    norms: Sequence[tuple[Tensor, float]],
    matrices: Sequence[tuple[Tensor, Tensor | None]],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """A decoder layer, with the bits of `rms_norm`, `linear`, `attend` and `swiglu` in turn.

    Args:
        x: (B, T, C), contiguous, in float32 or bfloat16.
        norms: weight and eps of the one before attention and of the one before the MLP.
        matrices: weight and scales, as for `linear`, of q, k, v, o, gate, up and down; all in one dtype.
        cos: as for `attend`, and so are the rest.
        sin: likewise.
        positions: likewise.
        keys: likewise.
        values: likewise.
        first: in a single row, the first token whose result is asked for; of others just keys and values are.
        out: takes the result, contiguous.

    Returns:
        (B, T - first, C), the residual stream after it.
    """
    y = torch.empty_like(x[:, first:]) if out is None else out
    # The values in between take ten times the memory of x. So a long text goes in parts; each sees those
    # before, which is all that it should see while positions do not go back.
    if positions.numel() > VECTORS and (positions.diff() >= 0).all():
        for rows, tokens in _parts(*positions.shape):
            at = rows, tokens
            turns = cos[rows, :, tokens], sin[rows, :, tokens]
            cached = positions[at], keys[rows], values[rows]
            start = min(max(first, tokens.start), tokens.stop)
            result = y[rows, start - first : tokens.stop - first]
            layer(x[at], norms, matrices, *turns, *cached, start - tokens.start, result)
        return y
    (B, T, C), (_, K, slots, D) = x.shape, keys.shape
    weights = [weight for weight, _ in matrices]
    n, width, F = B * T, len(weights[0]), len(weights[4])
    by_matvec = few(n)
    packed = 0 if by_matvec else _packed(n, max(C, width, F))
    room = _room.of(packed + n * (C + 2 * max(width + K * D, F))).data_ptr()
    done = _operation("layer", None, x.dtype)(
        _address("matvec", weights[0].dtype, x.dtype) if by_matvec else None,
        None if by_matvec else _address("matmul", weights[0].dtype, x.dtype),
        *[tensor.data_ptr() for tensor in (x, y)],
        *(room + packed * ctypes.sizeof(_FLOAT), room),
        (_POINTER * 2)(*[weight.data_ptr() for weight, _ in norms]),
        (_POINTER * 7)(*[weight.data_ptr() for weight in weights]),
        (_POINTER * 7)(*[None if scales is None else scales.data_ptr() for _, scales in matrices]),
        *[tensor.data_ptr() for tensor in (cos, sin, positions, keys, values)],
        *(B, T, first, C, width // D, K, D, F, slots),
        (_FLOAT * 2)(*[eps for _, eps in norms]),
        D**-0.5,
    )
    _require_slots(done, slots)
    return y


def _parts(B: int, T: int) -> list[tuple[slice, slice]]:
    """Some rows, or some tokens of one, of about VECTORS tokens each."""
    rows, tokens = _even(B, max(1, VECTORS // T)), _even(T, VECTORS)
    return [(some, part) for some in rows for part in tokens]


def _even(length: int, most: int) -> list[slice]:
    """As few parts as can be, of about the same size."""
    count = -(-length // most)
    ends = [length * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _require_slots(done: int, slots: int) -> None:
    if not done:
        raise IndexError(f"positions: the KV cache holds {slots - 1} tokens of a row, and one is beyond them")


@cache
def _address(name: str, weights: torch.dtype, activations: torch.dtype) -> int | None:
    """Where a product is, for compiled code to call it."""
    return ctypes.cast(_library(name, weights, activations)[name], _POINTER).value


@cache
def _operation(name: str, weights: torch.dtype | None, activations: torch.dtype | None) -> Callable[..., int]:
    """The C function of that name, compiled for those dtypes."""
    source = name if name in ("matvec", "matmul") else "step"
    operation = _library(source, weights, activations)[name]
    operation.argtypes = ARGUMENTS[name]
    operation.restype = ctypes.c_int if name in ("attend", "layer") else None
    return operation


@cache
def _library(source: str, weights: torch.dtype | None, activations: torch.dtype | None) -> ctypes.CDLL:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler was found")
    what = [("-D", weights), ("-DX_", activations)]
    names = [option + str(dtype).removeprefix("torch.").upper() for option, dtype in what if dtype]
    return ctypes.CDLL(str(_built(compiler, source, *names)))


def _built(compiler: str, source: str, *dtypes: str) -> Path:
    """The library, from the cache folder if it was built before on such a machine."""
    # Of one source, one command and one processor: a home folder may be shared by unlike machines.
    file = HOME / f"{source}.c"
    texts = [part.read_bytes() for part in (file, *sorted(HOME.glob("*.h")))]
    what = (texts, compiler, FLAGS, dtypes, _processor())
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama"
    built = home / f"{source}-{key}.so"
    if not built.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            unit, library = f"{folder}/unit.o", f"{folder}/library.so"
            # Linked without an OpenMP library, so that it finds the one that PyTorch has loaded: with two of
            # them there would be twice as many threads as cores.
            for command in (
                [compiler, *FLAGS, *dtypes, "-c", str(file), "-o", unit],
                [compiler, "-shared", unit, "-o", library],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            os.replace(library, built)
    return built


def _processor() -> str:
    """What -march=native depends on."""
    return platform.machine() + "".join(sorted(_flags()))


def _has(instructions: set[str]) -> bool:
    return bool(instructions.intersection(" ".join(_flags()).split()))


def _flags() -> set[str]:
    """The lines in which Linux lists what the processors can do; none on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return {line for line in lines if line.startswith(("flags", "Features"))}
