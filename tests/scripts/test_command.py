"""`tinyllama generate` is `python scripts/generate.py`, in a checkout and where the package is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.test_scripts import SCRIPT_NAMES, assert_refused
from tinyllama import __main__ as command
from tinyllama.cli import terminal

ROOT = Path(__file__).resolve().parents[2]


INSTALLED = """
import sys
_, site, model = sys.argv
sys.argv[1:] = ["generate", "--model", model, "The capital of France is", "--max-new-tokens", "2"]
from tinyllama import __main__ as command
try:
    command.main()
finally:
    from tinyllama.lab import page
    from tinyllama.parity import texts
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tinyllama"}
    assert all(module.__file__.startswith(site) for module in modules.values())
    assert texts.read("english")
"""


@pytest.fixture
def tinyllama(monkeypatch, capfd):
    """Runs the command in this process; returns its exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyllama", *arguments])
        with pytest.raises(SystemExit) as exit:
            command.main()
        return exit.value.code, *capfd.readouterr()

    return run


def test_the_list_has_every_script(tinyllama):
    status, out, err = tinyllama()
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == SCRIPT_NAMES
    assert tinyllama("--help") == (status, out, err)


def test_examples_are_commands_and_options_and_errors_are_the_script_s(tinyllama, smollm2_folder):
    status, out, _ = tinyllama("generate", "--help")
    assert status == 0
    assert '\n  tinyllama generate "Greetings!"' in out
    assert "scripts/" not in out
    assert_refused(tinyllama("nonsense"), "one of bench, chat")
    status, out, err = tinyllama("tokens", "--model", str(smollm2_folder), "hi")
    assert (status, err) == (0, "")
    assert "hi" in out


def test_a_package_that_is_missing_is_said_with_its_extra(capfd):
    def main() -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    with pytest.raises(SystemExit) as exit:
        terminal.run(main)
    assert_refused((exit.value.code, *capfd.readouterr()), "tinyllama[parity]")


def test_every_package_is_installed():
    listed = set(
        re.findall(r'^    "(tinyllama[\w.]*)",$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    )
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tinyllama").rglob("*.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"tinyllama.commands"}


def test_an_installed_package_works_outside_the_checkout(tmp_path, smollm2_folder):
    """The wheel carries the scripts, the C, the pages and the texts; nothing of the checkout is imported."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(ROOT)], check=True, capture_output=True)
    (site / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [one for one in sys.meta_path if 'Editable' not in repr(one)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(site), str(smollm2_folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The capital of France is Paris.\n"
