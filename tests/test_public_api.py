"""The public surface: every promised name is there, documented, and cheap to import."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import tinyllama
import tinyllama.explorer
import tinyllama.lab
import tinyllama.learn
import tinyllama.parity

PACKAGES = [tinyllama, tinyllama.explorer, tinyllama.lab, tinyllama.learn, tinyllama.parity]


def modules():
    return [
        importlib.import_module(info.name) for info in pkgutil.walk_packages(tinyllama.__path__, "tinyllama.")
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_had_and_completed(package):
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        thing = getattr(package, name)
        # A module of a function's name would take its place as soon as it is imported.
        assert inspect.ismodule(thing) == (name in ("explorer", "lab", "learn", "parity"))
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


def test_importing_the_package_imports_no_torch():
    code = "import sys, tinyllama; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_packages_are_there_after_importing_tinyllama_alone():
    # In a process of its own: here other tests have imported them. `compare` would import transformers, too.
    code = (
        "import tinyllama\n"
        "assert {'lab', 'parity', 'explorer', 'load', 'generate'} <= set(dir(tinyllama))\n"
        "assert 'check_attention' in dir(tinyllama.lab) and 'compare' in dir(tinyllama.parity)\n"
        "tinyllama.lab.load_kernel('window'), tinyllama.parity.difference, tinyllama.explorer"
    )
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
        "import tinyllama.lab, tinyllama.lab.scorecard, tinyllama.lab.page\n"
        "for package in (tinyllama, tinyllama.lab):\n"
        "    for name in package.__all__: getattr(package, name)\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
