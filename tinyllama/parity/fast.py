"""The weight modes under the judge: a plain model's matrices kept in fewer bits, and passes of every size.

A product has one way for a few vectors (matvec.c) and one for many (matmul.c). So a text goes through the
model in two parts: the first half in one pass, the rest through the KV cache in small pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.attention import Kernel, sdpa
from tinyllama.checkpoints.storage import Storage
from tinyllama.config import LlamaConfig
from tinyllama.fast import native
from tinyllama.fast.build import GROUP
from tinyllama.fast.linear import Int8Linear, widened
from tinyllama.fast.norm import FastRMSNorm
from tinyllama.hooks import shape
from tinyllama.model import Llama, RMSNorm
from tinyllama.parity.divergence import Run
from tinyllama.parity.reference import reference_model
from tinyllama.parity.trace import Trace, reference_trace, their_path, watch

# Sizes of the pieces after the first, over and over: matvec.c takes vectors by four, two or one at a time.
PIECES = range(1, 9)
# What joins the pieces' values where a piece has not seen the later keys.
UNSEEN = {"scores": -torch.inf, "pattern": 0.0}

Layers = Mapping[str, nn.Module]


def fast_layers(model: Llama, kind: str) -> Layers:
    """A layer that keeps its weights as in a mode, for every matrix of a plain model, by module path.

    Args:
        model: stays as it is.
        kind: "stored" keeps the model's own tensors, without a copy; "int8" rounds them.

    Raises:
        InputError: for "int8", a matrix has rows that cannot be divided into groups.
    """
    storage = Storage(kind, model.dtype)
    matrices = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: storage.linear(module.weight.detach()) for path, module in matrices.items()}


def divisible(model: Llama) -> bool:
    """Whether its matrices can be kept in 8 bits."""
    return all(module.in_features % GROUP == 0 for module in model.modules() if isinstance(module, nn.Linear))


def products(model: Llama, kind: str) -> str:
    """What a row's name adds where the compiled code of that mode does not run."""
    stored = {module.weight.dtype for module in model.modules() if isinstance(module, nn.Linear)}
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    claims = Storage(kind, model.dtype).claims(stored) if on_cpu else []
    held = [claim.check(wait=60) for claim in claims]
    return "" if held and all(held) else " on PyTorch's own products"


@contextmanager
def swapped(model: nn.Module, layers: Layers) -> Iterator[None]:
    """Put layers in the place of a model's own, and compiled norms too, until the block ends."""
    own = {path: model.get_submodule(path) for path in layers}
    norms = [module for module in model.modules() if type(module) is RMSNorm]
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        for module in norms:
            module.__class__ = FastRMSNorm
        yield
    finally:
        for module in norms:
            module.__class__ = RMSNorm
        for path, layer in own.items():
            model.set_submodule(path, layer)


def fast_run(model: Llama, layers: Layers, kernel: Kernel = sdpa) -> Run:
    """Our model with those layers, which it has while it runs."""

    def run(ids: Sequence[int], addresses: Iterable[str]) -> Trace:
        model.set_attention(kernel)
        with swapped(model, layers):
            return cached_trace(model, ids, addresses)

    return run


@torch.no_grad()
def cached_trace(model: Llama, ids: Sequence[int], addresses: Iterable[str]) -> Trace:
    """As `our_trace`, with a KV cache: half the text in one pass, the rest in pieces of 1, 2... 8 tokens."""
    cache, device = model.new_cache(1, len(ids)), model.embed_tokens.weight.device
    wanted, parts = list(addresses), []
    for start, end in pieces(len(ids)):
        with watch(model, wanted) as seen:
            model(torch.tensor([list(ids[start:end])], device=device), cache)
        parts.append(seen)
    return {address: _joined(address, [part[address] for part in parts], len(ids)) for address in wanted}


def pieces(length: int) -> list[tuple[int, int]]:
    """Where each pass over a text begins and ends; the first has more vectors than matvec.c is given."""
    end = min(max(length // 2, native.FEW + 1), length)
    spans, sizes = [(0, end)], cycle(PIECES)
    while end < length:
        start, end = end, min(end + next(sizes), length)
        spans.append((start, end))
    return spans


def _joined(address: str, values: Sequence[Tensor | None], length: int) -> Tensor | None:
    """The pieces' values as of one pass over the text, without the batch axis; None where one has none."""
    axes = shape(address).split()
    whole = []
    for value in values:
        if value is None:
            return None
        if axes[-1] == "S":
            value = F.pad(value, (0, length - value.shape[-1]), value=UNSEEN[address.rpartition(".")[2]])
        whole.append(value)
    return torch.cat(whole, dim=axes.index("T"))[0]


def dequantised(layer: Int8Linear) -> Tensor:
    """W in float32, by its definition: 7 bits times a scale's 8 are exact."""
    return widened(layer.weight, layer.scales, slice(None), torch.float32)


class Dequantised:
    """What the oracle reads of a model whose matrices were rounded to 8 bits: config, dtype, weights.

    Each matrix is computed when it is asked for: no second model in memory.
    """

    def __init__(self, model: Llama, layers: Layers) -> None:
        # Rounded, the head is a matrix of its own.
        self.config: LlamaConfig = replace(model.config, tie_word_embeddings=False)
        self.dtype = model.dtype
        self._weights = _Weights(model.state_dict(), layers)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The weights under the names of checkpoints less `model.`."""
        return self._weights


class _Weights(Mapping[str, Tensor]):
    """A state dict, some matrices of which are dequantised."""

    def __init__(self, plain: Mapping[str, Tensor], layers: Layers) -> None:
        self._plain, self._layers = plain, layers

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name.removesuffix(".weight"))
        return dequantised(layer) if isinstance(layer, Int8Linear) else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def dequantised_reference_run(model: Llama, layers: Layers, attention: str) -> Run:
    """Run transformers over the dequantised weights; `attention` is "eager" or "sdpa"."""
    reference = reference_model(model, attention)
    for path, layer in layers.items():
        assert isinstance(layer, Int8Linear)
        reference.set_submodule(their_path(path), _Plain(layer))
    return lambda ids, addresses: reference_trace(reference, ids, addresses)


class _Plain(nn.Module):
    """PyTorch's own product with the dequantised matrix, which is computed each time."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantised(self.layer))
