"""What every script does at a terminal: exit statuses, error lines, safe output, input from pipes."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from tinyllama.cli import together
from tinyllama.errors import InputError
from tinyllama.progress import escape, note

CLOSED_PIPE = 128 + 13  # the status of a program that SIGPIPE ended, which Windows does not have
# Packages that one command needs, and the extra of pyproject.toml that they come with.
EXTRAS = {
    "transformers": "parity",
    "accelerate": "parity",
    "gguf": "embedded",
    "matplotlib": "bench",
    "datasets": "evaluate",
    "lm_eval": "evaluate",
}

STDOUT_FAILS = (errno.ENOSPC, errno.EFBIG, errno.EIO)  # errors of writing that name no file


def run(main: Callable[[], int | None], ranks: bool = False) -> None:
    """Run a script's `main` and exit: 2 on bad input (one line, no traceback), 130 on Ctrl-C.

    A closed pipe (`generate.py | head`) ends the script quietly with status 141, as it ends `cat`. A
    full disk behind stdout counts as bad input, and so does an error in a user's kernel.

    Args:
        main: returns the exit status; None is 0.
        ranks: whether it can run on several ranks, as torchrun starts them. Then rank 0 prints, and one line
            says why they ended.
    """
    together.silence()
    if sys.stdout is None:
        refuse("stdout is closed; send it to a file or to /dev/null")
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's takes every character
        # A terminal that cannot show a character gets its escape, not a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    problem = None
    try:
        if together.size() > 1 and not ranks:
            raise InputError("this command computes in one process; start it by python, not by torchrun")
        with warnings.catch_warnings():  # after %run a notebook's warnings are its own again
            status = main() or 0
        sys.stdout.flush()
        if together.rank() > 0:  # rank 0's counts, and torchrun ends it, perhaps printing, when another fails
            status = 0
    except InputError as error:
        problem, status = str(error), 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT if together.rank() == 0 else 0
    except BrokenPipeError:
        status = CLOSED_PIPE
    except Exception as error:
        problem, status = said_by_others(error), 2
        if problem is None and together.size() == 1:
            raise
        if problem is None:
            problem, status = together.said_of(error), 1
    if status and together.size() > 1:
        together.leave(status, problem)
    if problem is not None:
        refuse(problem)
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more at exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def said_by_others(error: Exception) -> str | None:
    """The one line for an error of a user's kernel, of a package or of the system; None for our own."""
    kernels = sys.modules.get("tinyllama.lab.kernel_file")  # absent where no kernel was loaded
    if kernels and (failure := kernels.failure_in_a_kernel_file(error)):
        return f"{failure}; correct the kernel"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f'{error.name} is not installed: pip install "tinyllama[{EXTRAS[error.name]}]"'
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename!s:.200}: cannot be used ({error.strerror})"
    if isinstance(error, OSError) and error.errno in STDOUT_FAILS:
        return f"stdout: cannot be written ({error.strerror}); make room there"
    return None


def refuse(problem: str) -> None:
    """Print the one line of bad input to stderr."""
    note(f"error: {problem}")


def write(text: str) -> None:
    """Write generated text to stdout at once; on a terminal, control characters are escaped.

    A pipe or a file gets the text as it is.
    """
    sys.stdout.write(escape(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def piped() -> bool:
    """Whether stdin is a pipe or a file, not a terminal."""
    return sys.stdin is not None and not sys.stdin.isatty()


def read_text(path: str | None) -> str:
    """The text of a file, or of stdin for None or "-", as UTF-8.

    Raises:
        InputError: the file cannot be read, or byte N is not UTF-8.
    """
    stdin = path is None or path == "-"
    where = "stdin" if stdin else path
    if stdin and sys.stdin is None:
        raise InputError("stdin is closed; pipe a text in, or name a file")
    try:
        data = sys.stdin.buffer.read() if stdin else Path(str(path)).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}; give a readable text file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the text"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{where}: no file can have this name ({error})") from error
