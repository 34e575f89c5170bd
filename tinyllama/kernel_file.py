"""An attention kernel by its name, or out of a user's own file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tinyllama.attention import Kernel, kernel
from tinyllama.errors import InputError


def load_kernel(spec: str) -> Kernel:
    """The kernel that `eager`, `sdpa` or `file.py:function` stands for; runs the file.

    Raises:
        InputError: there is no such kernel, or the file fails.
    """
    file, colon, name = spec.rpartition(":")
    if not colon:
        return kernel(spec)
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file}: no such file; expected a kernel as file.py:function")
    # A name of its own: a file called random.py must not take the place of that module.
    source = importlib.util.spec_from_file_location(f"kernel_file_{path.stem}", path)
    if source is None or source.loader is None:
        raise InputError(f"{file}: expected a Python file, by the name of file.py")
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module  # where dataclasses look their own module up
    try:
        source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{file}: {type(error).__name__}: {error}; mend the file") from error
    function = getattr(module, name, None)
    if not callable(function):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{file}: expected a function {name!r}, found {', '.join(named) or 'none'}")
    return function
