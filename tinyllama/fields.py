"""Checks of the numbers that define a model, before anything is computed from them."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from tinyllama.errors import InputError

MAX_INTEGER = 2**31 - 1


def check_fields(values: Any, prefix: str = "") -> None:
    """Refuse a dataclass's numbers that are not positive and finite, and its flags that are not booleans."""
    for field in dataclasses.fields(values):
        name, value = prefix + field.name, getattr(values, field.name)
        if field.type == "int":  # annotations are strings, by the first import of the dataclass's file
            positive_integer(name, value)
        elif field.type == "float" or (field.type == "float | None" and value is not None):
            # Python's integers may exceed every float, and PyTorch's end at 2^63.
            object.__setattr__(values, field.name, positive_number(name, value))
        elif field.type == "bool" and not isinstance(value, bool):
            raise InputError(f"{name}: expected true or false, got {value!r:.80}; correct the file")


def positive_integer(name: str, value: Any) -> int:
    """The value, if it is a positive integer that a size can have; raises InputError that names it."""
    # bool is a subclass of int, and `true` is no layer count.
    if type(value) is not int or not 0 < value <= MAX_INTEGER:
        raise InputError(
            f"{name}: expected a positive integer up to {MAX_INTEGER}, got {value!r:.80}; correct the file"
        )
    return value


def positive_number(name: str, value: Any, at_most: float = sys.float_info.max) -> float:
    """The value as a float, if it is a positive finite number; raises InputError that names it."""
    if type(value) not in (int, float) or not 0 < value <= at_most:
        limit = "" if at_most == sys.float_info.max else f" up to {at_most:g}"
        raise InputError(
            f"{name}: expected a positive finite number{limit}, got {value!r:.80}; correct the file"
        )
    return float(value)
