"""Attributes that are other values while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INHERITED = object()


@contextmanager
def changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of objects, given as (object, name, value), and set them back afterwards."""
    before = [(thing, name, _own(thing, name)) for thing, name, _ in changes]
    try:
        for thing, name, value in changes:
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in before:
            if value is INHERITED:
                delattr(thing, name)
            else:
                setattr(thing, name, value)


def _own(thing: Any, name: str) -> Any:
    """The value, or INHERITED where it is the class's."""
    if name in vars(thing):
        return vars(thing)[name]
    return INHERITED if hasattr(type(thing), name) else getattr(thing, name)
