"""An attention kernel by its name, or from a user's file."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tinyllama.attention import Kernel
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS
from tinyllama.lab import restatements, variants

VARIANTS: dict[str, Kernel] = {
    name: getattr(module, name)
    for module, names in (
        (variants, "window sinks alibi no_positions softcap linear differential topk regroup ablate"),
        (restatements, "loops online flex"),
    )
    for name in names.split()
}
BUILT_IN = KERNELS | VARIANTS


def load_kernel(spec: str) -> Kernel:
    """The kernel of a name (`sdpa`, `window`), or of `file.py:function`, whose file is run.

    Settings may follow: `window:size=64`, `file.py:function:size=64,cap=(1,2)`.

    Raises:
        InputError: there is no such kernel or setting, or the file fails.
    """
    place, settings = spec, ""
    if found := re.search(r":(?=[A-Za-z_]\w*\s*=|[^:]*=)", spec):
        place, settings = spec[: found.start()], spec[found.end() :]
    file, colon, name = place.rpartition(":")
    kernel = _from_file(Path(file), name) if colon else _built_in(name)
    return partial(kernel, **_values(spec, kernel, settings)) if settings else kernel


def _built_in(name: str) -> Kernel:
    if name not in BUILT_IN:
        raise InputError(f"attention: expected {', '.join(BUILT_IN)} or file.py:function, got {name!r}")
    return BUILT_IN[name]


def _from_file(path: Path, name: str) -> Kernel:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a kernel as file.py:function")
    # A name of its own: a file called random.py must not replace that module.
    source = importlib.util.spec_from_file_location(f"kernel_file_{path.stem}", path)
    if source is None or source.loader is None:
        raise InputError(f"{path}: expected a Python file, by the name of file.py")
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module  # where dataclasses look up their module
    try:
        with _importable(path.resolve().parent):
            source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}; correct the file") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: expected a function {name!r}, found {', '.join(_named(module)) or 'none'}")
    return function


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import modules of its folder; it is last in the path, so that it hides no other module."""
    path, modules = sys.path[:], set(sys.modules)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        # A helper.py of another folder must not be mistaken for this one's.
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{folder}{os.sep}"):
                del sys.modules[name]


def _named(module: ModuleType) -> list[str]:
    return [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]


def _values(spec: str, kernel: Kernel, settings: str) -> dict[str, Any]:
    """The settings as keyword arguments of the kernel."""
    try:
        call = ast.parse(f"f({settings})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("a setting has no name")
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(values) < len(call.keywords) or "None" in values:
            raise ValueError("a setting comes twice, or has no name")
    except (SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"{spec}: expected settings as name=value,name=value, got {settings!r}") from error
    known = list(inspect.signature(kernel).parameters)[4:]  # after q, k, v and context
    wrong = [name for name in values if name not in known]
    if wrong:
        raise InputError(f"{spec}: expected settings {', '.join(known) or 'of none'}, got {wrong[0]!r}")
    return values
