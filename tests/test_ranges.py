"""Layers and heads are read as they are written."""

import pytest

from tinyllama.errors import InputError
from tinyllama.ranges import numbers, ranges


@pytest.mark.parametrize(("given", "text"), [([3], "3"), ([0, 1, 2], "0-2"), ([0, 1, 3, 5, 6], "0-1,3,5-6")])
def test_numbers_are_written_as_they_are_given(given, text):
    assert ranges(given) == text
    assert list(numbers(text)) == given


def test_no_numbers_are_nothing():
    assert ranges([]) == ""


@pytest.mark.parametrize("text", ["", "one", "3-1", "-1", "1,", "1-"])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match=f"^layers: expected numbers such as 0-3,7, got {text!r}$"):
        numbers(text, "layers: ")
