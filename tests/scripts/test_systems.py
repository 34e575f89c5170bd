"""What Windows does not have is not needed: modules, signals and functions that only Unix knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.scripts.test_scripts import SCRIPTS, tiny

__all__ = ["tiny"]  # a fixture

WITHOUT = """
import io, os, runpy, signal, sys
for name in ("resource", "readline", "fcntl", "termios", "pty", "tty", "pwd", "grp"):
    sys.modules[name] = None
for module, names in ((os, "fork getuid killpg setsid"), (signal, "SIGPIPE SIGKILL SIGALRM")):
    for name in names.split():
        delattr(module, name)
from pathlib import Path

def run(script, *arguments, stdin=b""):
    sys.argv = [script, *arguments]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    try:
        runpy.run_path(str(Path(scripts) / f"{script}.py"), run_name="__main__")
    except SystemExit as exit:
        assert exit.code == 0, (script, exit.code)

scripts, model = sys.argv[1:]
sys.path.append(scripts)
for script in sorted(path.stem for path in Path(scripts).glob("*.py")):
    run(script, "--help")
sys.stdout = io.TextIOWrapper(io.BytesIO(), "cp1252")  # as a console of Windows has it
short = ["--model", model, "--max-new-tokens", "2"]
for weights in ("exact", "stored"):
    run("generate", *short, "the cat \u4f60", "--stats", "--weights", weights)
run("chat", *short, stdin="the cat\\n/stats\\n".encode())
run("tokens", "--model", model, "the cat \u4f60")
sys.stdout.flush()
assert b"the cat" in sys.stdout.buffer.getvalue()
"""


def test_scripts_run_without_what_only_unix_has(tiny: Path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(SCRIPTS), str(tiny)], capture_output=True, text=True, cwd=tiny
    )
    assert done.returncode == 0, done.stderr
    assert "memory   not known" in done.stderr
