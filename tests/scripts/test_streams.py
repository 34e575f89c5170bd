"""What scripts do when stdin, stdout or stderr is closed or full: one line, never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import rich.console

from tests.marks import unix
from tests.scripts.test_scripts import PATIENCE, assert_refused, command, load_script, run_script, tiny
from tinyllama import progress
from tinyllama.cli import terminal
from tinyllama.errors import InputError
from tinyllama.text.conversation import Conversation

__all__ = ["run_script", "tiny"]  # fixtures

KERNELS = """
def wrong(q, k, v, context):
    return q @ k

def none(q, k, v, context):
    pass
"""


def in_shell(line: list[str], redirection: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command under a redirection of the shell."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *line], capture_output=True, text=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line_and_status_2(tiny: Path):
    for script in ("tokens", "generate"):  # rich prints, and print() does
        line = command(
            script, "--model", tiny, "the cat", *["--max-new-tokens", "1"][: 2 * (script == "generate")]
        )
        assert_refused(in_shell(line, ">/dev/full"), "stdout")


@unix
def test_closed_streams_are_one_line_or_do_not_matter(tiny: Path):
    line = command("tokens", "--model", tiny, "the cat")
    assert_refused(in_shell(line, ">&-"), "stdout is closed")
    assert_refused(in_shell(line[:-1], "<&-"), "no prompt")
    assert_refused(in_shell([*line[:-1], "--file", "-"], "<&-"), "stdin is closed")
    status, out, err = in_shell(line, "2>&-")
    assert (status, err) == (0, "")
    assert "cat" in out


@unix
def test_a_reader_that_leaves_a_table_ends_it_as_print_would(monkeypatch):
    # rich would exit with status 1.
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(BrokenPipeError):
            progress.TableConsole().print("a table")


def test_a_remark_is_not_printed_to_stdout_where_stderr_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    progress.note("a remark")
    assert capsys.readouterr().out == ""


def test_a_script_runs_in_a_notebook_and_leaves_it_as_it_was(tiny: Path, monkeypatch):
    class OutStream(io.TextIOBase):  # as in Jupyter: neither a file nor one that can be reconfigured
        text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

    cell, shown = OutStream(), warnings.showwarning
    monkeypatch.setattr(sys, "stdout", cell)
    monkeypatch.setattr(sys, "argv", ["tokens.py", "--model", str(tiny), "the cat"])
    with pytest.raises(SystemExit, match=r"^0$"):
        terminal.run(load_script("tokens").main)
    assert "cat" in cell.text
    assert warnings.showwarning is shown


@pytest.mark.parametrize("name", ["tokens", "generate"])
def test_a_name_that_no_file_can_have_is_refused(run_script, tiny: Path, name: str):
    for model in ("x" * 300, "~no-such-user/model", "a\0b"):
        assert_refused(run_script(name, "the cat", "--model", model), model[:1])
    for file in ("x" * 300, "a\0b"):
        assert_refused(run_script(name, "--file", file, "--model", tiny), file[:1])


@pytest.mark.parametrize("place", ["x" * 300, "a\0b", "absent/page.html", os.devnull])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(run_script, place: str):
    status, out, err = run_script("lab", "window", "--model", "smollm2", "--html", place)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--html" in err


@pytest.mark.parametrize("line", [f"/save {'x' * 300}", "/save ~no-such-user/f", "/load a\0b", "/save a\0b"])
def test_a_chat_refuses_such_a_name_too(run_script, tiny: Path, line: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    status, _, err = run_script("chat", "--model", tiny, stdin=line.encode())
    assert (status, err.count("\n")) == (2, 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/f", "a\0b"])
def test_such_a_name_does_not_end_a_conversation(name: str):
    # The loop at a terminal goes on after an InputError alone.
    conversation = Conversation.__new__(Conversation)
    conversation.messages = []
    with pytest.raises(InputError, match=name[:1]):
        load_script("chat").obey(conversation, f"/save {name}", {})


@pytest.mark.parametrize(
    ("name", "expected"), [("wrong", "mine.py:3: RuntimeError"), ("none", "mine.py:5: ")]
)
def test_what_a_kernel_does_wrong_is_said_with_its_line(
    run_script, tiny: Path, tmp_path: Path, name, expected
):
    file = tmp_path / "mine.py"
    file.write_text(KERNELS)
    status, _, err = run_script("generate", "--model", tiny, "the cat", "--attention", f"{file}:{name}")
    assert (status, err.count("\n")) == (2, 1)
    assert expected in err


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), ConnectionError("refused"), OSError("no file and no number"), KeyError("x")],
)
def test_other_errors_keep_their_traceback(error: Exception):
    def main() -> int:
        raise error

    with pytest.raises(type(error)):
        terminal.run(main)


def test_the_name_of_a_folder_reaches_a_terminal_escaped(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")  # a dumb one gets no bar
    monkeypatch.setattr(
        progress, "Console", lambda **_: rich.console.Console(file=screen, force_terminal=True)
    )
    hostile = "[bold]a[/bold]\x1b]0;title\x07"
    with progress.byte_progress(hostile, 10) as advance:
        advance(10)
    assert r"[bold]a[/bold]\x1b]0;title\x07" in screen.getvalue()
