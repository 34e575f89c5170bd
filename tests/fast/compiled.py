"""What tests of compiled code share."""

from __future__ import annotations

import pytest

from tinyllama.device import CPUINFO
from tinyllama.fast import compiler, libraries


def has_compiler() -> bool:
    """Whether there is a C compiler."""
    try:
        compiler.compiler()
    except libraries.BuildError:
        return False
    return True


compiled = pytest.mark.skipif(not has_compiler(), reason="needs gcc")
# Code for no processor in particular, for AVX2, and for this one without vectorising.
COMMON = ("-fPIC", "-fopenmp")
FLAGS = [
    ("-O3", *COMMON),
    ("-O3", "-mavx2", "-mfma", "-mf16c", *COMMON),
    ("-O1", "-march=native", *COMMON),
]


def needs(flags: tuple[str, ...]) -> None:
    """Skip where this processor cannot run code for those flags."""
    if "-mavx2" in flags and "avx2" not in CPUINFO.read_text():
        pytest.skip("this machine has no AVX2")
