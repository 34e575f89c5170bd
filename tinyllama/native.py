"""The compiled matrix-vector products of matvec.c: built once on each machine, in about a second."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tinyllama.machine import CPUINFO

SOURCE = Path(__file__).with_name("matvec.c")
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)

# matvec.c takes rows whose length is a multiple of this; 8-bit weights have a scale for as many.
GROUP = 64


@cache
def available() -> bool:
    """Whether the products can be used here; the first time they cannot, a warning says why."""
    try:
        for dtype in DTYPES:
            _product(dtype)
    except (OSError, subprocess.SubprocessError) as error:
        (reason, *_) = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"no compiled matrix products: {reason}; PyTorch's own are used, at about half the speed "
            "(gcc is what is needed)",
            stacklevel=2,
        )
        return False
    return True


def matvec(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
    """W x for every vector in x, with float32 sums.

    Args:
        weight: (rows, cols), contiguous, in float32, bfloat16, float16 or int8; cols is a multiple of 64.
        scales: for int8, (rows, cols / 64) in bfloat16; None otherwise.
        x: (..., cols), contiguous, in float32.

    Returns:
        (..., rows) in float32. A vector's bits are the same alone and among others.
    """
    rows, cols = weight.shape
    y = torch.empty(*x.shape[:-1], rows)
    place = None if scales is None else scales.data_ptr()
    _product(weight.dtype)(
        weight.data_ptr(), place, x.data_ptr(), y.data_ptr(), rows, cols, x.numel() // cols
    )
    return y


@cache
def _product(dtype: torch.dtype) -> Callable[..., None]:
    """matvec.c compiled for weights of that dtype."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler was found")
    product = ctypes.CDLL(str(_built(compiler, str(dtype).removeprefix("torch.").upper()))).matvec
    product.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
    product.restype = None
    return product


def _built(compiler: str, name: str) -> Path:
    """The library, from the cache folder if it was built before on such a machine."""
    # Of one source, one command and one processor: a home folder may be shared by unlike machines.
    what = (SOURCE.read_bytes(), compiler, FLAGS, name, _processor())
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama"
    built = home / f"matvec-{key}.so"
    if not built.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            unit, library = f"{folder}/matvec.o", f"{folder}/matvec.so"
            # Linked without an OpenMP library, so that it finds the one that PyTorch has loaded: with two of
            # them there would be twice as many threads as cores.
            for command in (
                [compiler, *FLAGS, f"-D{name}", "-c", str(SOURCE), "-o", unit],
                [compiler, "-shared", unit, "-o", library],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            os.replace(library, built)
    return built


def _processor() -> str:
    """What -march=native depends on."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    flags = {line for line in lines if line.startswith(("flags", "Features"))}
    return platform.machine() + "".join(sorted(flags))
