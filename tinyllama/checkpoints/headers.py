"""The tensors of a checkpoint folder, found and checked from the files' headers alone.

The format (huggingface/safetensors, README): 8 bytes of header length, a JSON header with each tensor's
dtype, shape and place, then the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tinyllama.checkpoints.files import AGAIN, INDEX, SINGLE, first_bytes, one_line, other_weights, read_json
from tinyllama.errors import InputError

# 22 layers need 25 kB; safetensors takes 9 s for a legal header of 33 MB.
MAX_HEADER_BYTES = 1 << 20

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

SHARD = re.compile(r"[\w.-]+\.safetensors")

# Some exporters store RoPE's table, which follows from the config.
HARMLESS_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that was not read yet: its file, its name there, dtype and shape."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder under the name it has in the model, from the headers alone.

    Raises:
        InputError: a file is missing, unsafe or malformed, or the index and the shards disagree.
    """
    # A link that leads nowhere counts as present, so that the message is about the link.
    single, index = os.path.lexists(folder / SINGLE), os.path.lexists(folder / INDEX)
    if single and index:
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the wrong one")
    if single:
        found = read_header(_safe_file(folder, SINGLE))
    elif index:
        found = _sharded(folder)
    else:
        what = other_weights(file.name for file in folder.glob("*"))
        raise InputError(f"{folder}: expected {SINGLE} or {INDEX}, found {what}; {AGAIN}")

    stored: dict[str, StoredTensor] = {}
    for key, tensor in found.items():
        name = key.removeprefix("model.")
        if name in stored:
            raise InputError(f"{tensor.path}: {key!r} and {stored[name].key!r} are the same tensor; {AGAIN}")
        if not key.endswith(HARMLESS_SUFFIX):
            stored[name] = tensor
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What one safetensors file holds, without its tensors' bytes.

    safetensors 0.8 checks the header against the file. It accepts two faults, which are refused here:
    a header of up to 100 MB, and a name that occurs twice.

    Raises:
        InputError: the file is truncated, malformed or inconsistent, or has a dtype that is not a float's.
    """
    start = first_bytes(path, 8 + MAX_HEADER_BYTES)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}; {AGAIN}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        size = path.stat().st_size
        raise InputError(
            f"{path}: expected a complete safetensors file, got {size} bytes that are not one "
            f"({one_line(error)}); {AGAIN}"
        ) from error
    # A list instead of a dict keeps both of two equal names.
    names = [name for name, _ in json.loads(start[8 : 8 + length], object_pairs_hook=list)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {twice[0]!r:.80} occurs twice in the header; {AGAIN}")
    for key, tensor in slices.items():
        if tensor.get_dtype() not in DTYPES:
            raise InputError(
                f"{path}: {key!r:.80} has dtype {tensor.get_dtype()}, expected {', '.join(DTYPES)}; "
                "use unquantised weights"
            )
    return {
        key: StoredTensor(path, key, DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))
        for key, tensor in slices.items()
    }


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards, each in the file that the index lists it in."""
    index = _safe_file(folder, INDEX)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index}: expected an object `weight_map` from tensor to file; {AGAIN}")
    shards = sorted(set(weight_map.values()))
    unsafe = [shard for shard in shards if not SHARD.fullmatch(shard)]
    if unsafe:
        raise InputError(f"{index}: expected plain names of .safetensors files, got {unsafe[0]!r}; {AGAIN}")
    absent = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if absent:
        raise InputError(f"{folder}: missing {', '.join(absent)}, which {INDEX} lists; {AGAIN}")

    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for key, tensor in read_header(_safe_file(folder, shard)).items():
            listed = weight_map.get(key, "no file")
            if listed != shard:
                raise InputError(f"{index}: {key!r} is in {shard}, but listed in {listed}; {AGAIN}")
            found[key] = tensor
    ghosts = sorted(weight_map.keys() - found.keys())
    if ghosts:
        names = ", ".join(map(repr, ghosts))
        raise InputError(f"{index}: lists {names}, but the listed files lack them; {AGAIN}")
    return found


def _safe_file(folder: Path, name: str) -> Path:
    """The file of that name in the folder, unless it is a link to what may be no weights at all.

    A stranger's folder can hold links to anything that the user may read. Those that download managers make
    lead to a file with the same ending, or to blobs/<hash> in a cache of the Hub.
    """
    path, home = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    ending = name[name.index(".safetensors") :]
    in_cache = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    if real.parent != home and not in_cache and not real.name.endswith(ending):
        raise InputError(
            f"{path}: is a link that leaves the folder, to {real}; let it lead to a file named "
            f"*{ending}, or put the file itself there"
        )
    return path
