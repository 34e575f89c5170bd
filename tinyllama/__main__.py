"""`tinyllama generate ...`, or `python -m tinyllama generate ...`: the scripts, by their names."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from tinyllama.cli import terminal
from tinyllama.errors import InputError

PACKAGE = Path(__file__).parent
# An installed package carries the scripts as tinyllama/commands; see pyproject.toml.
SCRIPTS = PACKAGE / "commands" if (PACKAGE / "commands").is_dir() else PACKAGE.parent / "scripts"


def main() -> None:
    """Run a script, or list them; exits."""
    terminal.run(command, ranks=sys.argv[1:2] in (["chat"], ["generate"]))


def command() -> int | None:
    """What the command line asks for."""
    commands = {path.stem: path for path in sorted(SCRIPTS.glob("[!_]*.py"))}
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        show(commands)
        return 0
    if name not in commands:
        raise InputError(f"{name!r:.80}: no such command; one of {', '.join(commands)}")
    sys.argv = [f"tinyllama {name}", *arguments]
    spec = importlib.util.spec_from_file_location(f"tinyllama_{name}", commands[name])
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    status: int | None = script.main()
    return status


def show(commands: dict[str, Path]) -> None:
    """Print every command with the first line of its script."""
    print("usage: tinyllama COMMAND ...\n")
    for name, path in commands.items():
        purpose = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        print(f"  {name:<10} {purpose.splitlines()[0]}")
    print("\ntinyllama COMMAND --help shows the options of a command, with examples.")


if __name__ == "__main__":
    main()
