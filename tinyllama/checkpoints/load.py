"""Official safetensors checkpoints -> a loaded model: strictly, with one copy of the weights in memory.

Everything is checked before memory is taken: paths, headers, names, shapes, dtypes, free memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyllama.attention import kernel
from tinyllama.checkpoints.files import AGAIN, INDEX, PICKLES, SINGLE, read_json
from tinyllama.checkpoints.tensor_file import StoredTensor, read_header
from tinyllama.config import LlamaConfig
from tinyllama.device import check_memory, floating_dtype, usable_device
from tinyllama.errors import InputError
from tinyllama.fast.fused import fuse
from tinyllama.fast.split_linear import Linear
from tinyllama.fast.storage import Storage
from tinyllama.model import Llama
from tinyllama.progress import byte_progress

SHARD = re.compile(r"[\w.-]+\.safetensors")

# Some exporters store RoPE's table, which follows from the config.
HARMLESS_SUFFIX = "rotary_emb.inv_freq"

HEAD = "lm_head.weight"


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    attention: str = "sdpa",
    weights: str = "exact",
) -> Llama:
    """Load a checkpoint folder.

    Peak memory is one copy of the weights and one tensor as stored. On the CPU, weights that stay as they are
    stored are the file's own pages, mapped: replace such a file by renaming another over it, for one that is
    cut short under a running model kills the process (SIGBUS).

    Args:
        folder: holds config.json and model.safetensors, or an index and its shards.
        device: "cpu", "cuda", "cuda:1"...
        dtype: of the activations, and of "exact" weights: float32, bfloat16, float16 or float64.
        attention: "eager" or "sdpa".
        weights: how matrices are kept. "exact": in `dtype`, and every bit is that of transformers. For speed,
            without gradients, equal but for rounding: "stored", as in the file where that is narrower than
            `dtype`; "float32", "bfloat16" or "float16"; "int8", with a scale for every 64. See `storage`.

    Raises:
        InputError: the folder, the config or the weights cannot be used; the message says why.
    """
    folder, device, dtype = Path(folder), usable_device(device), floating_dtype(dtype)
    chosen, storage = kernel(attention), Storage.of(weights, dtype, device)
    config = LlamaConfig.from_folder(folder)
    stored = find_tensors(folder)
    _check_layers(config, stored, folder)
    widest = max((tensor.dtype for tensor in stored.values()), key=lambda dtype: dtype.itemsize)
    check_memory("the model", int(sum(config.parameters.values()) * storage.itemsize(widest)), device)
    with torch.device("meta"), _Unfilled():
        model = Llama(config)
    _check_tensors(model, stored, folder)

    with byte_progress(f"loading {folder.name}", sum(t.end - t.start for t in stored.values())) as advance:
        state = {}
        matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
        if config.tie_word_embeddings:
            matrices.remove(HEAD)  # it is compared with the embedding first
        for name, values in _read(stored, device, storage):
            state[name] = values
            if storage.kind != "exact" and name in matrices:
                _keep(model, state, name, storage)
            advance(stored[name].end - stored[name].start)
    if config.tie_word_embeddings:
        head = state.setdefault(HEAD, state["embed_tokens.weight"])
        if not torch.equal(head, state["embed_tokens.weight"]):
            raise InputError(
                f"{folder}: config.json ties lm_head.weight to embed_tokens.weight, but the weights hold two "
                "different ones; set tie_word_embeddings to false"
            )
    if storage.kind != "exact":
        if config.tie_word_embeddings:
            _keep(model, state, HEAD, storage)
        model.requires_grad_(False)
    model.load_state_dict(state, strict=True, assign=True)
    if storage.kind != "int8":  # rounded, the head is a matrix of its own
        model.tie_weights()
    model.set_attention(chosen)
    if storage.kind != "exact" and device.type == "cpu":
        fuse(model)
    return model.to(device).eval()


def _keep(model: Llama, state: dict[str, Tensor], name: str, storage: Storage) -> None:
    """Put the layer that keeps such a matrix into the model, and what it keeps into the state."""
    path, layer = name.removesuffix(".weight"), storage.linear(state.pop(name))
    model.set_submodule(path, layer)
    state.update({f"{path}.{key}": tensor for key, tensor in layer.state_dict().items()})


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters without random values: drawing "on" the meta device imports a compiler, 1.4 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder under the name it has in the model, from the headers alone.

    Raises:
        InputError: a file is missing, unsafe or malformed, or index and shards disagree.
    """
    # Links that lead nowhere count as present: then the message is about them.
    single, index = os.path.lexists(folder / SINGLE), os.path.lexists(folder / INDEX)
    if single and index:
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if single:
        found = read_header(_safe_file(folder, SINGLE))
    elif index:
        found = _sharded(folder)
    else:
        pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
        what = f"only {pickles[0]}, refused: pickle can run any code" if pickles else "neither"
        raise InputError(f"{folder}: expected {SINGLE} or {INDEX}, found {what}; {AGAIN}")

    stored: dict[str, StoredTensor] = {}
    for key, tensor in found.items():
        name = key.removeprefix("model.")
        if name in stored:
            raise InputError(f"{tensor.path}: {key!r} and {stored[name].key!r} are the same tensor; {AGAIN}")
        if not key.endswith(HARMLESS_SUFFIX):
            stored[name] = tensor
    return stored


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards, each where the index says."""
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
            if key in found:
                raise InputError(f"{folder}: {key!r} is in both {found[key].path.name} and {shard}; {AGAIN}")
            found[key] = tensor
    for key in sorted(weight_map.keys() | found.keys()):
        listed, lies = weight_map.get(key, "no file"), found[key].path.name if key in found else "none"
        if listed != lies:
            raise InputError(f"{index}: {key!r} is listed in {listed}, but lies in {lies}; {AGAIN}")
    return found


def _safe_file(folder: Path, name: str) -> Path:
    """The file of that name in the folder, unless it is a link that leaves it."""
    path, home = folder / name, Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":  # the Hub's cache links snapshots/<commit>/<name> to blobs/<hash>
        allowed.append(home.parent.parent / "blobs")
    real = Path(os.path.realpath(path))
    if real.parent not in allowed:
        raise InputError(f"{path}: is a link that leaves the folder, to {real}; put the file itself there")
    return path


def _check_layers(config: LlamaConfig, stored: dict[str, StoredTensor], folder: Path) -> None:
    # Before the model is made, which for a billion layers would never end.
    layers = {name.split(".")[1] for name in stored if name.startswith("layers.")}
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{folder}: config.json has {config.num_hidden_layers} layers, the weights {len(layers)}; {AGAIN}"
        )


def _check_tensors(model: Llama, stored: dict[str, StoredTensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {HEAD} if model.config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - stored.keys() - optional)
    extra = sorted(stored.keys() - expected.keys())
    if missing or extra:
        raise InputError(
            f"{folder}: the weights do not fit config.json: missing {', '.join(missing) or 'nothing'}; "
            f"not known {', '.join(map(repr, extra)) or 'nothing'}; {AGAIN}"
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise InputError(
                f"{tensor.path}: {tensor.key} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name])}; {AGAIN}"
            )


def _read(
    stored: dict[str, StoredTensor], device: torch.device, storage: Storage
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on the device as it is to be kept, found finite."""
    files: dict[Path, Any] = {}
    for name, tensor in stored.items():
        dtype = storage.dtype_of(tensor.shape, tensor.dtype)
        try:
            # A file's pages that were read count as ours until it is closed. Where they are the weights, one
            # opening serves all; where they are converted, they must go before the next tensor comes.
            if tensor.path not in files or tensor.dtype != dtype or storage.kind == "int8":
                files = {tensor.path: safe_open(tensor.path, framework="pt")}
            values = files[tensor.path].get_tensor(tensor.key).to(device=device, dtype=dtype)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{tensor.path}: {tensor.key} cannot be loaded ({reason}); {AGAIN}") from error
        low, high = values.aminmax()  # one pass; NaN wins both
        if not (low.isfinite() and high.isfinite()):
            raise InputError(
                f"{tensor.path}: {tensor.key} holds NaN or Inf as {dtype}; {AGAIN}, or use float32"
            )
        yield name, values
