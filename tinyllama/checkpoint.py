"""Official safetensors checkpoints -> a loaded model: strictly, with one copy of the weights in memory.

Everything is checked before memory is taken: paths, headers, names, shapes, dtypes, free memory. The format:
8 bytes of header length, a JSON header with each tensor's dtype, shape and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyllama.attention import kernel
from tinyllama.config import LlamaConfig, read_json
from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.terminal import byte_progress

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "download the checkpoint again"

# 22 layers need 25 kB; parsing a legal 40 MB header took 2.8 s and 236 MB.
MAX_HEADER_BYTES = 1 << 20

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Some exporters store RoPE's table, which follows from the config.
HARMLESS_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, dtype, shape, and size in bytes."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    attention: str = "sdpa",
) -> Llama:
    """Load a checkpoint folder.

    Peak memory is one copy of the weights in `dtype` and one tensor as stored.

    Args:
        folder: holds config.json and model.safetensors, or an index and its shards.
        device: "cpu", "cuda", "cuda:1"...
        dtype: of the weights and activations: float32, bfloat16, float16 or float64.
        attention: "eager" or "sdpa".

    Raises:
        InputError: the folder, the config or the weights cannot be used; the message says why.
    """
    folder, device, dtype = Path(folder), usable_device(device), floating_dtype(dtype)
    chosen = kernel(attention)
    config = LlamaConfig.from_folder(folder)
    stored = find_tensors(folder)
    _check_layers(config, stored, folder)
    _check_memory(sum(config.parameters.values()) * dtype.itemsize, device)
    with torch.device("meta"):
        model = Llama(config)
    _check_tensors(model, stored, folder)

    state = {}
    with byte_progress(f"loading {folder.name}", sum(tensor.bytes for tensor in stored.values())) as advance:
        for name, tensor in stored.items():
            state[name] = _read(tensor).to(device=device, dtype=dtype)
            _check_finite(state[name], tensor)
            advance(tensor.bytes)
    if config.tie_word_embeddings:
        head = state.setdefault("lm_head.weight", state["embed_tokens.weight"])
        if not torch.equal(head, state["embed_tokens.weight"]):
            raise InputError(
                f"{folder}: config.json ties lm_head to embed_tokens, but the file's differ; {AGAIN}"
            )
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.set_attention(chosen)
    return model.to(device).eval()


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is no such device here. Never another one in its place.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device} was asked for, but PyTorch finds no CUDA device here; use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: {device} was asked for, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return found


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        InputError: it is none of float64, float32, bfloat16 and float16.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise InputError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder under the name it has in the model, from the headers alone.

    Raises:
        InputError: a file is missing, unsafe or malformed, or index and shards disagree.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if index.exists():
        found = _sharded(folder, index)
    elif single.exists() or single.is_symlink():
        found = read_header(_safe_file(folder, SINGLE))
    elif list(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: holds only pickled .bin weights, which can run code; convert them to {SINGLE}"
        )
    else:
        raise InputError(f"{folder}: expected {SINGLE} or {INDEX}, found neither; {AGAIN}")

    stored: dict[str, StoredTensor] = {}
    for key, tensor in found.items():
        name = key.removeprefix("model.")
        if name in stored:
            raise InputError(f"{tensor.path}: {key} and {stored[name].key} are the same tensor; {AGAIN}")
        if not key.endswith(HARMLESS_SUFFIX):
            stored[name] = tensor
    return stored


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index}: expected an object `weight_map` from tensor to file; {AGAIN}")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for key, tensor in read_header(_safe_file(folder, shard)).items():
            if key in found:
                raise InputError(f"{folder}: {key} is in both {found[key].path.name} and {shard}; {AGAIN}")
            found[key] = tensor
    for key in weight_map.keys() | found.keys():
        listed, lies = weight_map.get(key), found[key].path.name if key in found else None
        if listed != lies:
            raise InputError(f"{index}: {key} is listed in {listed}, but lies in {lies}; {AGAIN}")
    return found


def _safe_file(folder: Path, name: str) -> Path:
    """The regular file of that name inside the folder; nothing outside it, whatever an index says."""
    if name != os.path.basename(name) or "\\" in name or ":" in name or name in ("", ".", ".."):
        raise InputError(f"{folder / INDEX}: {name!r} is not a plain file name; {AGAIN}")
    path, real = folder / name, (folder / name).resolve()
    # The Hub's cache keeps files as links from snapshots/<commit>/ into blobs/.
    if real.parent not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
        raise InputError(f"{path}: is a link that leaves the folder, to {real}; put the file itself there")
    if not real.exists():
        raise InputError(f"{path}: no such file; {AGAIN}")
    if not stat.S_ISREG(real.stat().st_mode):
        raise InputError(f"{path}: expected a regular file, got something else; {AGAIN}")
    return path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, without its tensors' bytes.

    Raises:
        InputError: the file is truncated, malformed or inconsistent, or has a dtype that is not a float's.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix.startswith(b"version "):
            raise InputError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` or {AGAIN}")
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise InputError(f"{path}: {size} bytes cannot hold a header of {length} bytes; {AGAIN}")
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"{path}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}; {AGAIN}"
            )
        header = file.read(length)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
        with safe_open(path, framework="pt") as opened:  # checks spans: holes, overlaps, trailing bytes
            keys = set(opened.keys())
    except (ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path}: malformed safetensors header ({error}); {AGAIN}") from error
    tensors = {}
    for key in sorted(keys):
        dtype, shape, (start, end) = (
            entries[key]["dtype"],
            entries[key]["shape"],
            entries[key]["data_offsets"],
        )
        if dtype not in DTYPES and not key.endswith(HARMLESS_SUFFIX):
            raise InputError(
                f"{path}: {key} is {dtype}, expected one of {', '.join(DTYPES)}; use unquantised weights"
            )
        tensors[key] = StoredTensor(path, key, DTYPES.get(dtype, torch.float32), tuple(shape), end - start)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json and safetensors both keep the last of two equal keys in silence.
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _check_layers(config: LlamaConfig, stored: dict[str, StoredTensor], folder: Path) -> None:
    # Before the model is made, which for a billion layers would never end.
    layers = {name.split(".")[1] for name in stored if name.startswith("layers.")}
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{folder}: config.json has {config.num_hidden_layers} layers, the weights {len(layers)}; {AGAIN}"
        )


def _check_tensors(model: Llama, stored: dict[str, StoredTensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - stored.keys() - optional)
    extra = sorted(stored.keys() - expected.keys())
    if missing or extra:
        raise InputError(
            f"{folder}: the weights do not fit config.json: missing {', '.join(missing) or 'nothing'}; "
            f"not known {', '.join(extra) or 'nothing'}; {AGAIN}"
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise InputError(
                f"{tensor.path}: {tensor.key} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name])}; {AGAIN}"
            )


def _check_memory(needed: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"memory: the weights need {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free; "
            "use a 16-bit dtype or a smaller model"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def _read(tensor: StoredTensor) -> Tensor:
    # Opened anew for each tensor: closing the file gives its mapped pages back, so that a conversion to
    # another dtype does not hold the whole file as well.
    with safe_open(tensor.path, framework="pt") as file:
        return file.get_tensor(tensor.key)


def _check_finite(values: Tensor, tensor: StoredTensor) -> None:
    low, high = values.aminmax()  # one pass; NaN wins both
    if not (low.isfinite() and high.isfinite()):
        raise InputError(
            f"{tensor.path}: {tensor.key} holds NaN or Inf as {values.dtype}; {AGAIN}, or use float32"
        )
