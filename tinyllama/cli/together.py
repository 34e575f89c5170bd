"""A script on several ranks, as torchrun starts it: rank 0 reads and prints, and all end together."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

from tinyllama.progress import escape

if TYPE_CHECKING:
    from tinyllama.parallel.ranks import Ranks

Value = TypeVar("Value")

LAUNCHED = (
    "TINYLLAMA_LAUNCHED"  # set where `python -m tinyllama.parallel` started this, and says who was killed
)

# What this process has, for how it ends: its place among the ranks, and the stderr that it was silenced on.
_joined: list[Ranks] = []
_stderr: list[int] = []


def size() -> int:
    """How many processes torchrun started for this command; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def size_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def rank() -> int:
    """Which of them this is."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def command(script: str) -> str:
    """How this script was started, to be started again."""
    start = ["torchrun", "--nproc-per-node", str(size())] if size() > 1 else ["python"]
    return shlex.join([*start, f"scripts/{script}.py", *sys.argv[1:]])


def silence() -> None:
    """On all ranks but the first, read and print nothing."""
    if rank() > 0 and not _stderr:
        _stderr.append(os.dup(2))
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)


def join(on_gpus: bool) -> Ranks | None:
    """Meet the processes that share the model; None for a single one.

    Raises:
        InputError: they were started with other options.
        RankError: the others did not come.
    """
    if size() > 1 and not _joined:
        from tinyllama.parallel.ranks import Ranks

        _joined.append(Ranks.from_environment("nccl" if on_gpus else "gloo"))
        _joined[0].defer_interrupts()
        _joined[0].same("options", shlex.join(sys.argv[1:]))  # each host has its own command line
    return _joined[0] if _joined else None


def share(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on all ranks; JSON must be able to write it."""
    return _joined[0].share(make) if _joined else make()


def shared(lines: Iterator[str]) -> Iterator[str]:
    """The lines that rank 0 gets, on all ranks; the others' are not asked for."""
    while (line := share(lambda: next(lines, None))) is not None:
        yield line


def said_of(error: Exception) -> str | None:
    """The line for a lost rank, if its launcher says none; a mistake in the code is shown in full as well."""
    name, lines = type(error).__name__, str(error).splitlines()
    if name == "RankEndedError" and LAUNCHED in os.environ:
        return None
    if name in ("RankError", "RankEndedError"):
        return lines[0]
    traceback.print_exc()
    return f"{name}: {lines[0] if lines else 'no message'}"


def leave(status: int, problem: str | None) -> NoReturn:
    """End this rank, and with it the others; one of them says why.

    Args:
        status: the exit status.
        problem: one line for stderr; None if there is nothing to say.
    """
    first = _joined[0].ends(alike=status == 2) if _joined else rank() == 0
    if problem is not None and first:
        prefix = f"rank {rank()} of {size()}: " if rank() > 0 else ""
        os.write(_stderr[0] if _stderr else 2, f"error: {prefix}{escape(problem)}\n".encode())
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    os._exit(status)  # a process group with a lost rank cannot be taken down in order
