"""The compiled operations of csrc/: built once on each machine, in the background, and only when used."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tinyllama.device import CPUINFO

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
GROUP = 64  # 8-bit weights have one scale for so many columns; products take rows of a multiple of it
WAIT_SECONDS = 3.0


class BuildError(Exception):
    """There is no compiled code here; the message says why."""


@dataclass
class Build:
    """One library: what it is compiled from, and whether it is there.

    Attributes:
        sources: names of C files.
        defines: the constants and dtypes that they are compiled for.
        flags: the compiler's options.
        code: the loaded library, None before it is ready.
        functions: its functions that were used, by name.
    """

    sources: tuple[str, ...]
    defines: tuple[str, ...]
    flags: tuple[str, ...] = FLAGS
    code: ctypes.CDLL | None = None
    functions: dict[str, Any] = field(default_factory=dict, repr=False)
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Begin to compile unless it was done before on such a machine; does not wait.

        Raises:
            BuildError: there is no compiler, or no place for what it makes.
        """
        if self.code is not None or self._process is not None:
            return
        path = self._path()
        if path.exists():
            self.code = ctypes.CDLL(str(path))
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A process of its own goes on when this one ends early, so the work is not lost.
            self._process = subprocess.Popen(
                ["sh", "-c", self._script(path)], stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        except OSError as error:
            raise BuildError(str(error)) from error

    def ready(self, wait: float = 0.0) -> bool:
        """Whether the library can be used, after waiting for it at most so many seconds.

        Raises:
            BuildError: the compiler failed.
        """
        if self.code is not None:
            return True
        self.start()
        if self._process is not None:
            try:
                _, errors = self._process.communicate(timeout=max(wait, 0.001))
            except subprocess.TimeoutExpired:
                return False
            if self._process.returncode != 0:
                lines = errors.strip().splitlines() or ["the C compiler failed"]
                raise BuildError(next((line for line in lines if "error" in line), lines[0]))
            self._process = None
            self.code = ctypes.CDLL(str(self._path()))
        return self.code is not None

    def _path(self) -> Path:
        """Where it lies, named after all that it depends on: unlike machines may share a home folder."""
        texts = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
        what = (
            texts,
            self.sources,
            self.defines,
            compiler(),
            self.flags,
            platform.machine(),
            processor_flags(),
        )
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama"
        return home / f"{self.sources[0]}-{key}.so"

    def _script(self, path: Path) -> str:
        """Compile all sources at once, link them, and put the library in its place by renaming it."""
        folder = tempfile.mkdtemp(dir=path.parent)
        place = shlex.quote(folder)
        compile_all = " ".join(
            shlex.join([compiler(), *self.flags, *self.defines, "-c", str(SOURCES / f"{source}.c"), "-o"])
            + f" {place}/{source}.o &"
            for source in self.sources
        )
        # Linked without an OpenMP library, so that it uses the one that PyTorch has loaded: with two of them
        # there would be twice as many threads as cores.
        link = f"{shlex.quote(compiler())} -shared {place}/*.o -o {place}/library.so"
        objects = " && ".join(f"[ -f {place}/{source}.o ]" for source in self.sources)
        return (
            f"trap 'rm -rf {place}' EXIT; {compile_all} wait; {objects} && {link} && "
            f"mv {place}/library.so {shlex.quote(str(path))}"
        )


@cache
def products(weights: torch.dtype, activations: torch.dtype) -> Build:
    """Matrix products for weights and activations of those dtypes."""
    return Build(("matvec", "matmul"), (f"-DGROUP={GROUP}", _define(weights), _define(activations, "X_")))


@cache
def norm(activations: torch.dtype) -> Build:
    """RMSNorm for activations of that dtype."""
    return Build(("norm",), (_define(activations, "X_"),))


def compiler() -> str:
    """The C compiler.

    Raises:
        BuildError: there is none.
    """
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError("no C compiler was found (gcc is what is needed)")
    return found


def processor_flags() -> str:
    """What Linux lists as the processor's abilities, on which -march=native depends; empty elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _define(dtype: torch.dtype, prefix: str = "") -> str:
    return "-D" + prefix + str(dtype).removeprefix("torch.").upper()
