"""The public surface: every promised name is there, documented, and cheap to import."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import tinyllama


def modules():
    return [
        importlib.import_module(info.name) for info in pkgutil.walk_packages(tinyllama.__path__, "tinyllama.")
    ]


@pytest.mark.parametrize("name", tinyllama.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(tinyllama, name).__name__ == name


def test_the_table_of_places_lists_every_public_name_once():
    placed = [name for names in tinyllama._PLACES.values() for name in names]
    assert sorted(placed) == sorted(tinyllama.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tinyllama.nothing


def test_importing_the_package_imports_no_torch():
    code = "import sys, tinyllama; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_thing_has_a_docstring():
    bare = []
    for module in modules():
        assert module.__doc__, module.__name__
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(thing) or inspect.isfunction(thing):
                if not inspect.getdoc(thing):
                    bare.append(f"{module.__name__}.{name}")
                members = vars(thing).items() if inspect.isclass(thing) else ()
                bare += [
                    f"{module.__name__}.{name}.{member}"
                    for member, value in members
                    if inspect.isfunction(value) and not member.startswith("_") and not value.__doc__
                ]
    assert not bare


def test_the_runtime_imports_no_transformers():
    # The reference is never a part: only parity, tests and the bench import it.
    code = (
        "import sys, tinyllama\n"
        "for name in tinyllama.__all__: getattr(tinyllama, name)\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
