"""A kernel to begin with, as a file of the user's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tinyllama.checkpoints.files import replace_text
from tinyllama.errors import InputError


def new_kernel(path: Path, with_weights: bool = False) -> None:
    """Write a kernel with comments, as a function or as a module with weights.

    Raises:
        InputError: the file is there, is no Python file by its name, or cannot be written.
    """
    if path.suffix != ".py":
        raise InputError(
            f"{path}: expected a name that ends in .py, such as {path.stem or 'my_attention'}.py"
        )
    if path.exists():
        raise InputError(f"{path}: is there already, and nothing is written over; give another name")
    template = files(__package__) / ("new_module.txt" if with_weights else "new_kernel.txt")
    replace_text(path, template.read_text("utf-8").replace("{name}", path.name))
