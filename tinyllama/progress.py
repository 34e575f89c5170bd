"""Remarks and progress bars on stderr, in which control characters are escaped."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Invisible characters that reorder the text around them, so that it reads as something it is not.
BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape(text: str, keep: str = "") -> str:
    """The text with control and bidi characters written as escapes, except the characters in `keep`."""
    return "".join(
        character
        if character in keep or not (unicodedata.category(character) == "Cc" or character in BIDI_CONTROLS)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def note(line: str) -> None:
    """Print a remark to stderr, so that piped output stays clean; if stderr is closed, print nothing."""
    if sys.stderr is not None:  # print(file=None) would take stdout
        with suppress(OSError):
            print(escape(line), file=sys.stderr, flush=True)


class TableConsole(Console):
    """Where scripts print their tables: stdout."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Leave it to `terminal.run`, as print() does; rich would exit with status 1."""
        raise


def printed(show: Callable[[Console], object], width: int = 110) -> str:
    """What a function prints to a console, as plain text without the last line's end."""
    with io.StringIO() as text:
        # A notebook's kernel asks for colours and for HTML.
        show(Console(file=text, width=width, highlight=False, color_system=None, force_jupyter=False))
        return text.getvalue().rstrip("\n")


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; yields `advance(bytes)`. Silent if stderr is not a terminal."""
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with _progress(TextColumn("{task.description}", markup=False), *columns) as progress:
        task = progress.add_task(escape(title), total=total)
        yield lambda size: progress.update(task, advance=size)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """One line with the time so far and the latest step; yields `done(what)`, to be called after each step.

    If stderr is not a terminal, each step is printed as a line, except those with a comma in their names:
    they are details.
    """
    columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with _progress(*columns) as progress:
        task = progress.add_task("", total=None)

        def done(what: str) -> None:
            progress.update(task, description=escape(what))
            if progress.disable and "," not in what:
                note(what)

        yield done


@contextmanager
def step_progress(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` steps, of which `done` are done; yields `step(what)`, called after each.

    If stderr is not a terminal, a line is printed after every tenth of the steps.
    """
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with _progress(TextColumn("{task.description}", markup=False), *columns) as progress:
        task = progress.add_task("", total=total, completed=done)
        count = done

        def step(what: str) -> None:
            nonlocal count
            count += 1
            progress.update(task, advance=1, description=escape(what))
            if progress.disable and (count * 10 // total) > ((count - 1) * 10 // total):
                note(f"{count} of {total}: {what}")

        yield step


def _progress(*columns: ProgressColumn) -> Progress:
    """A display on stderr that goes away at the end; disabled if stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
