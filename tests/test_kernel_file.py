"""A kernel out of a user's file: what is taken, and the one line that each mistake gets."""

import random
import sys

import pytest
import torch

from tinyllama.attention import KERNELS
from tinyllama.errors import InputError
from tinyllama.lab.kernel_file import load_kernel


@pytest.fixture
def kernel_file(tmp_path):
    """Writes a file of that name; returns its path."""

    def write(content, name="mine.py"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", KERNELS)
def test_a_name_is_the_built_in_kernel(name):
    assert load_kernel(name) is KERNELS[name]


def test_a_file_gives_the_function_of_that_name(kernel_file):
    file = kernel_file("def first(q, k, v, context): return q\ndef second(q, k, v, context): return v")
    q, v = torch.zeros(1), torch.ones(1)
    assert load_kernel(f"{file}:first")(q, None, v, None) is q
    assert load_kernel(f"{file}:second")(q, None, v, None) is v


def test_a_file_may_have_dataclasses_and_the_name_of_another_module(kernel_file):
    # Dataclasses with annotations that are strings look their own module up in sys.modules.
    code = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "@dataclass",
        "class Window:",
        "    size: int = 8",
        "    def __call__(self, q, k, v, context): return self.size",
        "window = Window()",
    ]
    file = kernel_file("\n".join(code), "random.py")
    assert load_kernel(f"{file}:window")(None, None, None, None) == 8
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("def attend(q, k, v, context): pass", "absent", "expected a function 'absent', found attend$"),
        ("attend = 3", "attend", "expected a function 'attend', found none$"),
        ("_attend = len", "", "expected a function '', found none$"),
        ("def attend(:", "attend", "SyntaxError: .*; mend the file"),
        ("import no_such_module", "attend", "ModuleNotFoundError: .*'no_such_module'; mend the file"),
        ("1 / 0", "attend", "ZeroDivisionError: division by zero; mend the file"),
        # Otherwise the script would end here with status 0, as if all had passed.
        ("raise SystemExit(0)", "attend", "SystemExit: 0; mend the file"),
    ],
)
def test_a_file_without_the_kernel_is_refused(kernel_file, content, name, expected):
    with pytest.raises(InputError, match=f"mine.py: {expected}"):
        load_kernel(f"{kernel_file(content)}:{name}")


def test_what_is_no_kernel_at_all_is_refused(kernel_file, tmp_path):
    with pytest.raises(InputError, match="expected eager, sdpa, window, .* or file.py:function, got 'flash'"):
        load_kernel("flash")
    for place in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(InputError, match="no such file; expected a kernel as"):
            load_kernel(f"{place}:attend")
    with pytest.raises(InputError, match="expected a Python file"):
        load_kernel(f"{kernel_file('', 'mine.txt')}:attend")
