"""An attention kernel by its name, or from a user's file."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tinyllama.advice import did_you_mean
from tinyllama.attention import Kernel
from tinyllama.checkpoints.files import one_line
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS
from tinyllama.lab import restatements, smaller_caches, variants
from tinyllama.lab.printing import Printer

VARIANTS: dict[str, Kernel] = {
    name: getattr(module, name)
    for module, names in (
        (variants, "window sinks alibi no_positions softcap linear differential topk ablate"),
        (smaller_caches, "regroup quantised"),
        (restatements, "loops online flex"),
    )
    for name in names.split()
}
BUILT_IN = KERNELS | VARIANTS
# What a setting may be that a kernel annotates as a number; a kernel checks other settings itself.
NUMBERS: dict[Any, tuple[type, ...]] = {"int": (int,), "float": (int, float)}
MODULE = "kernel_file_"  # begins the name of the module that a user's file becomes


def load_kernel(spec: str) -> Kernel:
    """The kernel of a name (`sdpa`, `window`), or of `file.py:function`, whose file is run.

    Settings may follow: `window:size=64`, `file.py:function:size=64,cap=(1,2)`.

    Raises:
        InputError: there is no such kernel or setting, or the file fails.
    """
    return _load(spec, python_file)


def load_kernels(specs: Iterable[str]) -> dict[str, Kernel]:
    """The kernels of some names, by name. A file that several of them name is run once: it may take long.

    Raises:
        InputError: see `load_kernel`.
    """
    run_once = cache(python_file)
    return {spec: _load(spec, run_once) for spec in specs}


def trusted_kernel(spec: str, named: Iterable[str]) -> Kernel:
    """The kernel that a file of weights asks for: a built-in one, or one that the user has named too.

    Raises:
        InputError: it is in a Python file that the user did not name, so its code must not run; or see
            `load_kernel`.
    """
    file, _, _ = _parts(spec)
    same = [one for one in named if Path(one).name == Path(spec).name]  # the folder may be another today
    if file is not None and not same:
        raise InputError(
            f"the kernel {spec!r:.200} is code in a file, which weights must not choose; if you trust it, "
            "name it on the command line too"
        )
    return load_kernel(same[0] if same else spec)


def failure_in_a_kernel_file(error: BaseException) -> InputError | None:
    """What to say of an error that a user's kernel raised: the file, its line, the error. None for others."""
    if isinstance(error.__cause__, StopIteration):  # a generator makes a RuntimeError of it
        error = error.__cause__
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(MODULE)
    ]
    return InputError(f"{lines[-1]}: {type(error).__name__}: {one_line(error)}") if lines else None


def _load(spec: str, run: Callable[[Path], ModuleType]) -> Kernel:
    file, name, settings = _parts(spec)
    kernel = _from_module(Path(file), run(Path(file)), name) if file is not None else _built_in(name)
    return partial(kernel, **_values(spec, kernel, settings)) if settings else kernel


def _parts(spec: str) -> tuple[str | None, str, str]:
    """The file (None for a built-in kernel), the name and the settings."""
    place, settings = spec, ""
    if found := re.search(r":(?=[A-Za-z_]\w*\s*=|[^:]*=)", spec):
        place, settings = spec[: found.start()], spec[found.end() :]
    file, colon, name = place.rpartition(":")
    return file if colon else None, name, settings


def _built_in(name: str) -> Kernel:
    if name not in BUILT_IN:
        raise InputError(
            f"attention: expected {', '.join(BUILT_IN)} or file.py:function, got {name!r:.80}"
            f"{did_you_mean(name, BUILT_IN)}"
        )
    return BUILT_IN[name]


def _from_module(path: Path, module: ModuleType, name: str) -> Kernel:
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            f"{path}: expected a function {name!r:.80}, found {', '.join(_named(module)) or 'none'}"
        )
    _check_arguments(path, name, function)
    return function


def python_file(path: Path) -> ModuleType:
    """Run a user's file, and return the module that it becomes.

    Raises:
        InputError: there is no such file, or it fails.
    """
    if not os.path.isfile(path):  # which is False for a name that is too long, too
        raise InputError(
            f"{path!s:.200}: no such file; expected a Python file, of a kernel as file.py:function"
        )
    # A name of its own: a file called random.py must not replace that module.
    source = importlib.util.spec_from_file_location(f"{MODULE}{path.stem}", path)
    if source is None or source.loader is None:
        raise InputError(f"{path}: expected a Python file, by the name of file.py")
    module = importlib.util.module_from_spec(source)
    vars(module)["print"] = Printer()
    sys.modules[source.name] = module  # where dataclasses look up their module
    try:
        with _importable(path.resolve().parent):
            source.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit would end the script as if all had gone well
        failure = failure_in_a_kernel_file(error) or f"{path}: {type(error).__name__}: {one_line(error)}"
        raise InputError(f"{failure}; correct the file") from error
    return module


def _check_arguments(path: Path, name: str, function: Kernel) -> None:
    """Raise InputError unless it can be called with queries, keys, values and a context."""
    place = f"{path}:{_line(function)}"
    if isinstance(function, type):
        raise InputError(
            f"{place}: {name} is a class, expected a kernel; make one at the end of the file, "
            f"kernel = {name}(), and name that: {path}:kernel"
        )
    if inspect.iscoroutinefunction(function):
        raise InputError(f"{place}: {name} is an async function, which a kernel cannot be; leave out async")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function that is not written in Python
        return
    try:
        signature.bind("q", "k", "v", "context")
    except TypeError as error:
        raise InputError(
            f"{place}: a kernel is called with (q, k, v, context), but {name}{signature} cannot be: {error}"
        ) from error


def _line(function: Any) -> int:
    """Where a function or class of a file begins; 1 for what has no source."""
    try:
        return inspect.getsourcelines(inspect.unwrap(function))[1] or 1
    except (OSError, TypeError):
        return 1


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
    own = {key: value for key, value in vars(module).items() if not isinstance(value, Printer)}
    return [key for key, value in own.items() if callable(value) and not key.startswith("_")]


def _values(spec: str, kernel: Kernel, settings: str) -> dict[str, Any]:
    """The settings as keyword arguments of the kernel."""
    try:
        call = ast.parse(f"f({settings})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("a setting has no name")
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(values) < len(call.keywords) or "None" in values:
            raise ValueError("a setting comes twice, or has no name")
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(
            f"{spec:.200}: expected settings as name=value,name=value, got {settings!r:.80}"
        ) from error
    known = dict(list(inspect.signature(kernel).parameters.items())[4:])  # after q, k, v and context
    for name, value in values.items():
        if name not in known:
            raise InputError(
                f"{spec:.200}: expected settings {', '.join(known) or 'of none'}, got {name!r:.80}"
            )
        kind = known[name].annotation
        kind = getattr(kind, "__name__", kind)
        if kind in NUMBERS and not (type(value) in NUMBERS[kind] and abs(value) < 2**63):
            raise InputError(f"{spec:.200}: {name}: expected {kind}, got {value!r:.80}")
    return values
