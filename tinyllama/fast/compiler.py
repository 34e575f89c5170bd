"""The machine's C compiler, the options that it knows, and the processor that it compiles for."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache

from tinyllama.device import CPUINFO
from tinyllama.fast.libraries import BuildError, cache_folder

COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-fPIC")
# Of each of these the first that works: Apple's clang has OpenMP by another name or not at all, and that of
# PyTorch may be another than clang's; -march=native is for x86, -mcpu=native for ARM.
OPENMP = (("-fopenmp",), ("-Xpreprocessor", "-fopenmp"))
NATIVE = (("-march=native",), ("-mcpu=native",))
LATER = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()  # symbols that come with PyTorch
TRIAL_SECONDS = 3.0
REGION = b"""
void work(int *x) {
#pragma omp parallel for
    for (int i = 0; i < 8; i++) x[i] = i;
}
"""


def compiler() -> list[str]:
    """The command of the C compiler: $CC, or the first that is found.

    Raises:
        BuildError: there is none.
    """
    with suppress(ValueError):  # quotes that do not end
        if (command := shlex.split(os.environ.get("CC", ""))) and shutil.which(command[0]):
            return command
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError("no C compiler was found (gcc is what is needed)")
    return [found]


def processor_flags() -> str:
    """What Linux lists as the processor's abilities, on which -march=native depends; empty elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


@cache
def usable(choices: tuple[tuple[str, ...], ...], command: tuple[str, ...]) -> tuple[str, ...]:
    """The first of the options with which the compiler makes a library that can be loaded here, or none.

    Raises:
        BuildError: the compiler takes seconds for three lines, so it cannot be asked.
    """
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        for number, options in enumerate(choices):
            library = f"{folder}/{number}.so"
            line = [*command, *options, "-fPIC", "-shared", *LATER, "-x", "c", "-", "-o", library]
            try:
                subprocess.run(line, input=REGION, capture_output=True, check=True, timeout=TRIAL_SECONDS)
                ctypes.CDLL(library)
                return options
            except subprocess.TimeoutExpired as error:
                raise BuildError("the C compiler is too slow") from error
            except (OSError, subprocess.CalledProcessError):
                continue
    return ()
