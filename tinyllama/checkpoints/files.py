"""Reading regular files of limited size, and making files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError

from tinyllama.errors import InputError
from tinyllama.progress import note

# The weights of a checkpoint folder: one file, or an index and its shards.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")  # never opened: unpickling can run any code

UNFINISHED = ".unfinished-"  # before the name of a folder that is not complete yet
PARTIAL = ".tinyllama-partial-"  # before the name of a folder with a file that is not complete yet
GONE_SECONDS = 24 * 3600.0  # a writer that began earlier was killed

GGUF = "GGUF is llama.cpp's format, expected safetensors; give the model that it was made from"
AGAIN = "download the checkpoint again"

# The largest text file of a checkpoint is the tokenizer's: Llama 3's has 9 MB.
MAX_TEXT_BYTES = 64 << 20


def first_bytes(path: Path, count: int) -> bytes:
    """The first `count` bytes of a regular file, or all of a shorter one.

    Raises:
        InputError: it is absent, unreadable, empty, no regular file, or a Git-LFS pointer to the real one.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; a checkpoint folder needs it, {AGAIN}")
    if not os.path.isfile(path):  # before opening: a FIFO would block
        raise InputError(f"{path}: expected a regular file, found something else; {AGAIN}")
    try:
        with path.open("rb") as file:
            data = file.read(count)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git-LFS pointer, not the file itself; run `git lfs pull` or {AGAIN}")
    if not data:
        raise InputError(f"{path}: the file is empty; {AGAIN}")
    return data


def other_weights(names: Iterable[str]) -> str:
    """What there is instead of safetensors, among these files."""
    for name in sorted(names):
        if name.endswith(PICKLES):
            return f"only {name}, refused: pickle can run any code"
        if name.lower().endswith(".gguf"):
            return f"only {name}: {GGUF}"
    return "none"


def read_bytes(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes; raises InputError as `first_bytes` does."""
    data = first_bytes(path, most + 1)
    if len(data) > most:
        raise InputError(f"{path}: expected at most {most} bytes, got {path.stat().st_size}; {AGAIN}")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, or does not hold a JSON object.
    """
    data = read_bytes(path)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}; {AGAIN}")
    return values


def one_line(error: BaseException) -> str:
    """The start of the error's first line, or its class if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def make_folder(folder: Path, fill: Callable[[Path], None], doing: str, *, keep: bool = False) -> None:
    """Make a folder unless it exists: it appears whole or not at all.

    If two processes want it, one makes it; the other prints one line and waits.

    Args:
        folder: what to make.
        fill: is given another path, makes the folder there and fills it; then it is renamed to `folder`.
        doing: what the line of a waiting process says, for example "downloading org/name".
        keep: whether an unfinished folder stays for the next attempt if `fill` fails.

    Raises:
        InputError: nothing can be written there, or the disk is full.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock"), doing):
            if folder.exists():
                return
            if not keep:
                shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
            try:
                fill(unfinished)
                for file in filter(Path.is_file, unfinished.rglob("*")):
                    _sync(file)
                unfinished.rename(folder)
            finally:
                if not keep:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or one_line(error)}); "
            "make room there, or make it writable"
        ) from error


def _lock(path: Path, doing: str) -> AcquireReturnProxy:
    """Take a lock file for as long as the result, a context, lasts."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        note(f"another process is {doing}: waiting for it")
        return lock.acquire()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {what} needs {needed:,} bytes of disk, {free:,} are free; make room")


def replace_text(path: Path, text: str) -> None:
    """Write a text file; see `replace_file`. A lone surrogate, as in a file's name, becomes its escape."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, and put it in the place of `path`: that is the old file or all of the new one.

    What a killed process left there a day ago or earlier is removed.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("there is something that is not a file")
        _sweep(path.parent)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
            partial = Path(folder, "file")
            write(partial)
            _sync(partial)
            partial.replace(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); give another place, or make room there"
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        with suppress(FileNotFoundError):  # another writer was done, or swept too
            if left.stat().st_mtime < time.time() - GONE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write the file to the disk itself: renamed before, it could be empty after a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
