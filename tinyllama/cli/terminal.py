"""What every script shares at a terminal: error lines, exit statuses, progress bars, safe output."""

from __future__ import annotations

import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tinyllama.errors import InputError

INTERRUPTED = 128 + signal.SIGINT

# Invisible characters that reorder the text around them, so that it reads as something it is not.
BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 2 on bad input (one line, no traceback), 130 on Ctrl-C.

    A closed pipe (`generate.py | head`) ends the script quietly with status 141, as it ends `cat`.
    """
    if sys.stdout is not None:
        # A terminal that cannot show a character gets its escape, not a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = main() or 0
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def visible(text: str, keep: str = "") -> str:
    """The text with control and bidi characters written as escapes, except the characters in `keep`."""
    return "".join(
        character
        if character in keep or not (unicodedata.category(character) == "Cc" or character in BIDI_CONTROLS)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def write(text: str) -> None:
    """Write generated text to stdout at once; on a terminal, control characters are escaped.

    A pipe or a file gets the text as it is.
    """
    sys.stdout.write(visible(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(line: str) -> None:
    """Print a remark to stderr, so that piped output stays clean."""
    print(visible(line), file=sys.stderr, flush=True)


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; yields `advance(bytes)`. Silent where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.update(task, advance=size)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """One line that tells what is being done and for how long; yields `done(what)`, to be told of each step.

    Where stderr is no terminal, the steps whose names have no comma are printed.
    """
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def done(what: str) -> None:
            progress.update(task, description=visible(what))
            if not console.is_terminal and "," not in what:
                note(what)

        yield done


@contextmanager
def step_progress(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar over steps, `done` of them behind; yields `step(what)`, to be called after each.

    Where stderr is no terminal, every tenth part of the way is printed as a line.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done)
        count = done

        def step(what: str) -> None:
            nonlocal count
            count += 1
            progress.update(task, advance=1, description=visible(what))
            if not console.is_terminal and (count * 10 // total) > ((count - 1) * 10 // total):
                note(f"{count} of {total}: {what}")

        yield step


def piped() -> bool:
    """Whether something is piped into stdin, rather than a person at it, or nothing."""
    return sys.stdin is not None and not sys.stdin.isatty()


def read_text(path: str | None) -> str:
    """The text of a file, or of stdin for None or "-", as UTF-8.

    Raises:
        InputError: the file cannot be read, or byte N is not UTF-8.
    """
    where = "stdin" if path is None or path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path is None or path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}; give a readable text file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the text"
        ) from error
