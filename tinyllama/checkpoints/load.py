"""A model's name -> the model and its tokenizer, with one copy of the weights in memory.

Everything is checked before memory is taken: paths, headers, names, shapes, dtypes and free memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyllama.attention import Kernel
from tinyllama.checkpoints.config_file import check_kernel, read_config
from tinyllama.checkpoints.files import AGAIN, one_line
from tinyllama.checkpoints.headers import StoredTensor, find_tensors
from tinyllama.checkpoints.hub import resolve
from tinyllama.checkpoints.storage import Storage, record_steps, speed_up, start
from tinyllama.config import LlamaConfig
from tinyllama.device import check_memory, floating_dtype, usable_device
from tinyllama.errors import InputError
from tinyllama.kernels import kernel, kernel_name, kernel_source
from tinyllama.model import Llama
from tinyllama.parallel.plan import Plan
from tinyllama.progress import byte_progress
from tinyllama.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tinyllama.parallel.ranks import Ranks

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
PLACES = 64  # bytes
WHOLE = "whole"  # the split in which every rank has all of the model


def load(
    name: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    attention: Kernel | str = "sdpa",
    weights: str = "exact",
    threads: int | None = None,
    graph: bool = False,
    ranks: Ranks | None = None,
    split: str = "exact",
    pipeline: int = 1,
) -> tuple[Llama, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        name: a name on the Hub, a folder, "smollm2" (the embedded model), or None for TinyLlama-1.1B-Chat.
        device: see `load_model`.
        dtype: see `load_model`.
        attention: see `load_model`.
        weights: see `load_model`.
        threads: how many threads compute, in all of PyTorch; None leaves it as it is (all cores).
        graph: on a GPU, record the first decode step of a generation and replay it for the others: the same
            kernels, started at once. See `fast.graph`.
        ranks: see `load_model`.
        split: see `load_model`.
        pipeline: see `load_model`.

    Raises:
        InputError: the model cannot be found or used; the message says why and what to do.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads: expected 1 or more, got {threads}")
    folder = resolve(name)
    tokenizer = Tokenizer.from_folder(folder)
    vocab_size = read_config(folder).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}; "
            "put the model's own tokenizer there"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(
        folder,
        device=device,
        dtype=dtype,
        attention=attention,
        weights=weights,
        ranks=ranks,
        split=split,
        pipeline=pipeline,
    )
    if graph:
        record_steps(model)
    return model, tokenizer


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    attention: Kernel | str = "sdpa",
    weights: str = "exact",
    ranks: Ranks | None = None,
    split: str = "exact",
    pipeline: int = 1,
) -> Llama:
    """Load a checkpoint folder.

    Peak memory is one copy of the weights and one tensor as stored. On the CPU, weights that stay as they are
    stored are the file's own pages, mapped: a file that is cut short under a running model kills the process
    (SIGBUS), so replace it only by renaming another over it.

    Args:
        folder: holds config.json and model.safetensors, or an index and its shards.
        device: "cpu", "cuda", "cuda:1", "mps"...
        dtype: of the activations, and of "exact" weights: float32, bfloat16, float16 or float64.
        attention: "eager", "sdpa", another name that `lab.load_kernel` takes, or a function.
        weights: how matrices are kept. "exact": in `dtype`, and every bit is that of transformers. For speed,
            without gradients, equal but for rounding: "stored", as in the file where that is narrower than
            `dtype`; "float32", "bfloat16" or "float16"; "int8", with a scale for every 64. See `storage`.
        ranks: this process among those that share the model; it reads and keeps its own part alone. None: it
            has the whole model.
        split: how it is shared: "exact", every bit that of one process, or "fast"; see `parallel.plan`.
            "whole": each has all of it, found to be the same, to learn from its own windows (see `lab.heal`).
        pipeline: into how many stages of layers the ranks are divided; each stage shares its layers.

    Raises:
        InputError: the folder, the config or the weights cannot be used; the message says why.
        RankError: another rank ended, or is late.
    """
    folder, device, dtype = Path(folder), usable_device(device), floating_dtype(dtype)
    if device.type == "mps" and dtype == torch.float64:
        raise InputError("dtype: an Apple GPU has no float64; use float32")
    chosen, storage = kernel(attention), Storage.of(weights, dtype, device)
    config = read_config(folder)
    check_kernel(folder, kernel_name(chosen), kernel_source(chosen))
    stored = find_tensors(folder)
    model = _skeleton(config, stored, folder)
    plan = None if ranks is None or split == WHOLE else Plan.of(config, ranks.size, split, pipeline)
    if ranks is not None:
        _agree(ranks, folder, stored, f"{split}, pipeline {pipeline}")
    if plan is not None and ranks is not None:
        from tinyllama.parallel.layers import narrow

        narrow(model, plan, ranks.rank)
    own = {name: tensor.numel() for name, tensor in model.state_dict().items()}  # of this process
    elsewhere = {name for name, numbers in own.items() if numbers == 0}  # in another stage
    sizes = {name: own[name] * tensor.dtype.itemsize for name, tensor in stored.items()}
    widest = max((tensor.dtype for tensor in stored.values()), key=lambda dtype: dtype.itemsize)
    claims = storage.claims({tensor.dtype for tensor in stored.values()}) if device.type == "cpu" else []
    start(claims)
    check_memory("the model", int(model.num_parameters() * storage.itemsize(widest)), device)

    with byte_progress(f"loading {folder.name}", sum(sizes.values())) as advance:
        empty = ((name, model.get_parameter(name).shape) for name in elsewhere)
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in empty}
        matrices = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
        if config.tie_word_embeddings:
            matrices.remove(HEAD)  # it is compared with the embedding first
        dtypes = {
            name: storage.dtype_of(tensor.dtype) if name in (matrices | {EMBEDDING, HEAD}) else dtype
            for name, tensor in stored.items()
        }
        places = {} if plan is None or ranks is None else plan.places(stored, ranks.rank)
        here = {name: tensor for name, tensor in stored.items() if name not in elsewhere}
        for name, values in _read(here, device, dtypes, places, rounded=storage.kind == "int8"):
            state[name] = values
            if storage.kind != "exact" and name in matrices:
                _keep(model, state, name, storage)
            advance(sizes[name])
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
    model = model.to(device).eval()
    if device.type == "cpu":
        speed_up(model, claims, all_threads=storage.kind == "exact" or plan is not None)
    if plan is not None and ranks is not None:
        from tinyllama.parallel.layers import connect

        ranks.same("compiled code", ", ".join(claim.name for claim in claims if claim.holds))
        ranks.traffic.bytes_read = sum(sizes.values())
        connect(model, plan, ranks)
    return model


def _agree(ranks: Ranks, folder: Path, stored: dict[str, StoredTensor], split: str) -> None:
    """Go on if all ranks load the same checkpoint, by the same code, to share it alike."""
    from tinyllama.parallel.ranks import checkpoint_version, code_version

    ranks.same("version of the code", code_version())
    ranks.same("checkpoint", checkpoint_version(folder / "config.json", stored))
    ranks.same("split", split)


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


def _skeleton(config: LlamaConfig, stored: dict[str, StoredTensor], folder: Path) -> Llama:
    """The config's model without weights, if its tensors are exactly the stored ones."""
    # At most one layer more than the weights have is made: a config may claim a billion.
    found = {name.split(".")[1] for name in stored if name.startswith("layers.")}
    layers = min(config.num_hidden_layers, len(found) + 1)
    with torch.device("meta"), _Unfilled():
        model = Llama(dataclasses.replace(config, num_hidden_layers=layers))

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {HEAD} if config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - stored.keys() - optional)
    extra = sorted(stored[name].key for name in stored.keys() - expected.keys())
    if missing or extra:
        names = [name if name == HEAD else f"model.{name}" for name in missing]
        raise InputError(
            f"{folder}: the weights do not fit config.json, which has {config.num_hidden_layers} layers: "
            f"missing {', '.join(names) or 'nothing'}; not known {', '.join(map(repr, extra)) or 'nothing'}; "
            f"{AGAIN}"
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise InputError(
                f"{tensor.path}: {tensor.key} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name])}; {AGAIN}"
            )
    return model


def _read(
    stored: dict[str, StoredTensor],
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    places: dict[str, tuple[slice, ...]],
    rounded: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, or its part at a place, on the device as it is to be kept, found finite."""
    files: dict[Path, Any] = {}
    for name, tensor in stored.items():
        dtype = dtypes[name]
        try:
            # A file's pages that were read count as ours until it is closed. Where they are the weights, one
            # opening serves all; where they are converted, they must go before the next tensor comes.
            place = places.get(name)
            if tensor.path not in files or tensor.dtype != dtype or rounded or place is not None:
                files = {tensor.path: safe_open(tensor.path, framework="pt")}
            file = files[tensor.path]
            if place is None:
                values = file.get_tensor(tensor.key)
            else:  # copied: the system maps far more of a file than the part that is read
                values = _copied(file.get_slice(tensor.key)[place])
            values = values.to(device=device, dtype=dtype)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{tensor.path}: {tensor.key} cannot be loaded ({one_line(error)}); {AGAIN}"
            ) from error
        low, high = values.aminmax()  # one pass; NaN wins both
        if not (low.isfinite() and high.isfinite()):
            raise InputError(
                f"{tensor.path}: {tensor.key} holds NaN or Inf as {dtype}; {AGAIN}, or use float32"
            )
        yield name, values


def _copied(part: Tensor) -> Tensor:
    """The part of a file, in memory as it lies there.

    Its place modulo 16 bytes stays, because the bits of MKL's matrix-vector products depend on it.
    """
    first = part.data_ptr() % PLACES // part.itemsize
    room = torch.empty(first + part.numel(), dtype=part.dtype)  # PyTorch begins it at a multiple of PLACES
    return room[first:].view(part.shape).copy_(part)
