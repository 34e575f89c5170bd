"""Reading and writing files with care: regular files only, JSON objects, one writer, room on the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tinyllama.errors import InputError
from tinyllama.progress import note

# The weights of a checkpoint folder: one file, or an index and its shards.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")  # never opened: unpickling can run any code

AGAIN = "download the checkpoint again"

# Of a checkpoint's JSON files the tokenizer's is the largest: Llama 3's has 9 MB.
MAX_JSON_BYTES = 64 << 20


def read_bytes(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        InputError: it is absent, unreadable, empty, no regular file, or a Git LFS pointer to the real one.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; a checkpoint folder needs it, {AGAIN}")
    if not os.path.isfile(path):  # before opening: a FIFO would block
        raise InputError(f"{path}: expected a regular file, found something else; {AGAIN}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git-LFS pointer, not the file itself; run `git lfs pull` or {AGAIN}")
    if not data:
        raise InputError(f"{path}: the file is empty; {AGAIN}")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: as `read_bytes`, or the file does not hold a JSON object.
    """
    if os.path.isfile(path) and path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(
            f"{path}: expected at most {MAX_JSON_BYTES} bytes, got {path.stat().st_size}; {AGAIN}"
        )
    try:
        values = json.loads(read_bytes(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}; {AGAIN}")
    return values


@contextmanager
def sole_writer(folder: Path, doing: str) -> Iterator[None]:
    """Hold the lock on making `folder`; where another process has it, say so in one line and wait."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"another process is {doing}: waiting for it")
            lock.acquire()
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot be written ({error.strerror}); make it writable"
        ) from error
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError where the disk of `folder` (whose parent exists) has less than `needed` bytes free."""
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise InputError(
            f"{folder.parent}: {what} needs {needed:,} bytes of disk, {free:,} are free; free some space"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a text file by renaming a finished one over it: an old file stays whole whatever happens.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another place, or make room there"
        ) from error
