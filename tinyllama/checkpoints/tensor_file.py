"""The header of a safetensors file: what tensors it holds, and where.

The format (huggingface/safetensors, README): 8 bytes of header length, a JSON header with each tensor's
dtype, shape and place, then the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyllama.checkpoints.files import AGAIN
from tinyllama.errors import InputError

# 22 layers need 25 kB; parsing a legal 40 MB header took 2.8 s and 236 MB.
MAX_HEADER_BYTES = 1 << 20

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, dtype, shape, and the bytes from `start` up to `end`."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, without its tensors' bytes.

    Raises:
        InputError: the file is truncated, malformed or inconsistent, or has a dtype that is not a float's.
    """
    header, size = _header_bytes(path)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not sound JSON ({error}); {AGAIN}") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected a JSON object as header, got {type(entries).__name__}; {AGAIN}")

    data = 8 + len(header)
    tensors = [
        _stored(path, key, entry, data) for key, entry in sorted(entries.items()) if key != "__metadata__"
    ]
    end = data
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "follows a hole"
            raise InputError(f"{path}: {tensor.key!r} {what}, at byte {tensor.start}; {AGAIN}")
        end = tensor.end
    if end != size:
        what = "truncated" if size < end else "followed by other bytes"
        raise InputError(f"{path}: {what}: expected {end} bytes by its header, got {size}; {AGAIN}")
    return {tensor.key: tensor for tensor in tensors}


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The header and the size of the file."""
    if not os.path.isfile(path):  # before opening: a FIFO would block
        what = "something else" if os.path.lexists(path) else "nothing"
        raise InputError(f"{path}: expected a regular file, found {what}; {AGAIN}")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    if prefix == b"version ":
        raise InputError(f"{path}: a Git-LFS pointer, not the weights; run `git lfs pull` or {AGAIN}")
    if length > MAX_HEADER_BYTES and length <= size - 8:
        raise InputError(
            f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}; {AGAIN}"
        )
    if len(prefix) < 8 or len(header) < length:
        raise InputError(f"{path}: {size} bytes cannot hold a header of {length} bytes; {AGAIN}")
    return header, size


def _stored(path: Path, key: str, entry: Any, data: int) -> StoredTensor:
    """One entry of a header, checked; `data` is the byte where the tensors begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{path}: {key!r}: expected dtype, shape and data_offsets, got {entry!r:.80}; {AGAIN}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in list(DTYPES):
        raise InputError(
            f"{path}: {key!r} has dtype {dtype!r:.80}, expected {', '.join(DTYPES)}; use unquantised weights"
        )
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        # Few: multiplying a header full of dimensions would take seconds.
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(map(_is_size, numbers)):
            raise InputError(f"{path}: {key!r}: {name} must be a few sizes, got {numbers!r:.80}; {AGAIN}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InputError(
            f"{path}: {key!r}: shape {shape!r:.80} of {dtype} does not fill bytes {offsets!r:.80}; {AGAIN}"
        )
    return StoredTensor(path, key, DTYPES[dtype], tuple(shape), data + offsets[0], data + offsets[1])


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 0


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json and safetensors both keep the last of two equal keys in silence.
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"{key!r} occurs twice")
        entries[key] = value
    return entries
