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

from tinyllama.fast.compiler import FLAGS, LATER, NATIVE, OPENMP, compiler, processor_flags, usable
from tinyllama.fast.libraries import BuildError, cache_folder, find_library

SOURCES = Path(__file__).parent / "csrc"
GROUP = 64  # 8-bit weights have one scale for this many columns; products take rows of a multiple of it
WAIT_SECONDS = 3.0


@dataclass
class Build:
    """One library: what it is compiled from, and whether it is there.

    Attributes:
        sources: names of C files.
        defines: the constants and dtypes that they are compiled for.
        flags: the compiler's options; None: the fastest that it knows.
        code: the loaded library, None before it is ready.
        functions: its functions that were used, by name.
    """

    sources: tuple[str, ...]
    defines: tuple[str, ...]
    flags: tuple[str, ...] | None = None
    code: ctypes.CDLL | None = None
    functions: dict[str, Any] = field(default_factory=dict, repr=False)
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Begin to compile unless it was done before on such a machine; does not wait.

        Raises:
            BuildError: there is no compiler, or no safe place for what it makes.
        """
        if self.code is not None or self._process is not None:
            return
        name, folder = self._name(), cache_folder()
        if (library := find_library(folder, name)) is not None:
            self._load(library)
        if self.code is not None:
            return
        try:
            # A process of its own goes on when this one ends early, so the work is not lost.
            self._process = subprocess.Popen(
                ["sh", "-c", self._script(folder, name)],
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise BuildError(str(error)) from error

    def ready(self, wait: float = 0.0) -> bool:
        """Whether the library can be used, after waiting for it at most that many seconds.

        Raises:
            BuildError: the compiler failed, or made something that cannot be loaded.
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
                raise BuildError(next((line for line in lines if "error" in line), lines[0])[:300])
            self._process = None
            library = find_library(cache_folder(), self._name())
            if library is None or not self._load(library):
                raise BuildError(f"what {shlex.join(compiler())} made cannot be loaded")
        return self.code is not None

    def function(self, name: str) -> Any:
        """A function of the library, which is ready.

        Raises:
            BuildError: it has no such function.
        """
        try:
            return self.code[name]  # type: ignore[index]
        except AttributeError as error:
            raise BuildError(f"the compiled library has no {name}") from error

    def _load(self, library: Path) -> bool:
        """Load the library, or remove what is none."""
        try:
            self.code = ctypes.CDLL(str(library))
        except OSError:
            library.unlink(missing_ok=True)
        return self.code is not None

    def _name(self) -> str:
        """A name for all that it depends on: unlike machines may share a home folder."""
        texts = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
        command = compiler()
        program = os.stat(shutil.which(command[0]) or command[0])
        what = (
            texts,
            self.sources,
            self.defines,
            (command, program.st_size, program.st_mtime_ns),  # another version of it is another compiler
            self.flags or (FLAGS, OPENMP, NATIVE),
            platform.machine(),
            processor_flags(),
        )
        return f"{self.sources[0]}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"

    def _script(self, cache: Path, name: str) -> str:
        """Compile all sources at once, link them, and put the library in its place by renaming it."""
        folder = tempfile.mkdtemp(dir=cache)
        place = shlex.quote(folder)
        command = compiler()
        flags = self.flags
        if flags is None:
            flags = FLAGS + usable(OPENMP, tuple(command)) + usable(NATIVE, tuple(command))
        compile_all = " ".join(
            shlex.join([*command, *flags, *self.defines, "-c", str(SOURCES / f"{source}.c"), "-o"])
            + f" {place}/{source}.o &"
            for source in self.sources
        )
        # Linked without an OpenMP library, so that it uses the one that PyTorch has loaded: with two of them
        # there would be twice as many threads as cores.
        link = f"{shlex.join([*command, '-shared', *LATER])} {place}/*.o -o {place}/library.so"
        objects = " && ".join(f"[ -f {place}/{source}.o ]" for source in self.sources)
        # The size is part of the name: to load a library that was cut off would kill the process (SIGBUS).
        put = f"mv {place}/library.so {shlex.quote(str(cache / name))}.$(($(wc -c < {place}/library.so))).so"
        return f"umask 077; trap 'rm -rf {place}' EXIT; {compile_all} wait; {objects} && {link} && {put}"


@cache
def products(weights: torch.dtype, activations: torch.dtype) -> Build:
    """Matrix products for weights and activations of those dtypes."""
    return Build(("matvec", "matmul"), (f"-DGROUP={GROUP}", _define(weights), _define(activations, "X_")))


@cache
def norm(activations: torch.dtype) -> Build:
    """RMSNorm for activations of that dtype."""
    return Build(("norm",), (_define(activations, "X_"),))


def _define(dtype: torch.dtype, prefix: str = "") -> str:
    return "-D" + prefix + str(dtype).removeprefix("torch.").upper()
