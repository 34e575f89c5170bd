"""Put a learner's functions into a trained model, and let it write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tinyllama.attention
from tinyllama.attention import AttentionContext, AttentionMask
from tinyllama.cache import KVCache
from tinyllama.config import LlamaConfig
from tinyllama.learn import ours
from tinyllama.learn.judge import Function, TimeIsUp, as_tensor, time_limit, using
from tinyllama.learn.mistakes import sub
from tinyllama.model import MLP, Llama, RMSNorm
from tinyllama.parity.changed import changed

PROMPT = "Once upon a time, in a small village by the sea, there lived"
TOKENS = 24
SECONDS = 20.0  # of writing; loops over single numbers write a few tokens in that time


@dataclass(frozen=True)
class Text:
    """What a model wrote.

    Attributes:
        ids: the new ones.
        seconds: what they took.
        whole: whether it came to its end in time.
    """

    ids: list[int]
    seconds: float
    whole: bool


@torch.no_grad()
def write(
    model: Llama,
    functions: Mapping[str, Function],
    ids: Sequence[int],
    tokens: int = TOKENS,
    sampling: tuple[float, int, float] = (0.0, 0, 1.0),
    seconds: float = SECONDS,
) -> Text:
    """Continue a text with the functions that are given in the place of ours.

    Args:
        model: a trained one, in float32 with exact weights.
        functions: right ones, by step.
        ids: the prompt.
        tokens: how many follow at most.
        sampling: temperature, top_k and top_p; by the learner's `sample` if it is given.
        seconds: how long it may take.
    """
    choose, generator = functions.get("sample", ours.sample), torch.Generator().manual_seed(0)
    text, new, start, whole = list(ids), list[int](), time.perf_counter(), False
    next_logits = _next_logits(model, functions)
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(using(function, {**ours.FUNCTIONS, **functions}, but=name))
        if not functions.keys() & {"llama", "decode"}:  # those are whole models
            stack.enter_context(grafted(model, functions))
        try:
            with time_limit(seconds):
                while len(new) < tokens and not whole:
                    logits = next_logits(text)
                    new.append(int(as_tensor(choose(logits, *sampling, generator))))
                    text.append(new[-1])
                    whole = new[-1] in model.config.eos_ids
        except TimeIsUp:
            return Text(new, time.perf_counter() - start, False)
    return Text(new, time.perf_counter() - start, True)


def _next_logits(model: Llama, functions: Mapping[str, Function]) -> Callable[[list[int]], Tensor]:
    """From a text to the logits of its next token, by the largest right part of the learner's."""
    weights, config = dict(model.state_dict()), model.config
    if "decode" in functions:
        cache: dict[Any, Any] = {}
        done: list[int] = []

        def decoded(text: list[int]) -> Tensor:
            new = torch.tensor(text[len(done) :])
            done[:] = text
            return as_tensor(functions["decode"](new, weights, config, cache))[-1]

        return decoded
    if "llama" in functions:
        return lambda text: as_tensor(functions["llama"](torch.tensor(text), weights, config))[-1]
    ordinary = model.new_cache(1, config.context)
    return lambda text: model(torch.tensor([text[ordinary.length :]]), ordinary)[0, -1]


@contextmanager
def grafted(model: Llama, functions: Mapping[str, Function]) -> Iterator[None]:
    """Let the model compute with these functions, of the steps up to `block`, while the block runs."""
    grafts = [
        graft
        for step, function in functions.items()
        if step in GRAFTS
        for graft in GRAFTS[step](model, function)
    ]
    with changed(*grafts):
        yield


# A graft is a change of an attribute: the object, the name, the value while the learner's function is used.
Grafts = Iterator[tuple[Any, str, Any]]


def _by_row(function: Function, dtype: torch.dtype, *rest: Any) -> Callable[[Tensor], Tensor]:
    """A function of one text, and of what else it is given, as a function of a batch of texts."""
    return lambda batch: torch.stack([as_tensor(function(row, *rest)).to(dtype) for row in batch])


def _embedding(model: Llama, function: Function) -> Grafts:
    table = model.embed_tokens.weight
    yield model.embed_tokens, "forward", _by_row(function, table.dtype, table)


def _rms_norm(model: Llama, function: Function) -> Grafts:
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        yield norm, "forward", _by_row(function, norm.weight.dtype, norm.weight, norm.eps)


def _frequencies(model: Llama, function: Function) -> Grafts:
    speeds = as_tensor(function(model.config.head_dim, model.config.rope_theta))
    yield model.rotary, "frequencies", lambda dtype, device: speeds.to(dtype)


def _rope(model: Llama, function: Function) -> Grafts:
    rotary, positions_of = model.rotary.forward, dict[str, Tensor]()

    # The model's rotate is given cos and sin, the learner's function positions: they are noted on the way.
    def noting(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        positions_of["this pass"] = positions
        return rotary(positions, dtype)

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        speeds = model.rotary.frequencies(torch.float32, x.device)
        rows = zip(x, positions_of["this pass"], strict=True)
        return torch.stack(
            [as_tensor(function(row, positions, speeds)).to(x.dtype) for row, positions in rows]
        )

    yield model.rotary, "forward", noting
    yield tinyllama.attention, "rotate", rotate


def _attention(model: Llama, function: Function) -> Grafts:
    def kernel(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        return torch.stack([as_tensor(function(*row)).to(q.dtype) for row in zip(q, k, v, strict=True)])

    for attention in model.attentions:
        yield attention, "kernel", kernel


def _swiglu(model: Llama, function: Function) -> Grafts:
    for mlp in (module for module in model.modules() if isinstance(module, MLP)):
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        yield mlp, "forward", _by_row(function, gate.dtype, gate, up, down)


def _block(model: Llama, function: Function) -> Grafts:
    for n, layer in enumerate(model.layers):
        weights = sub(model.state_dict(), f"layers.{n}.")
        yield layer, "forward", partial(_run_block, function, weights, model.config, n)


def _run_block(
    function: Function,
    weights: Mapping[str, Tensor],
    config: LlamaConfig,
    layer: int,
    x: Tensor,
    _rotation: tuple[Tensor, Tensor],
    mask: AttentionMask,
    cache: KVCache,
) -> Tensor:
    """A learner's block in the place of one of the model's, for one text."""

    def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = cache.write(layer, mask, k[None], v[None])
        return keys[0], values[0]

    y = function(x[0], weights, config, mask.query_positions[0], remember)
    return as_tensor(y)[None].to(x.dtype)


GRAFTS: dict[str, Callable[[Llama, Function], Grafts]] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "frequencies": _frequencies,
    "rope": _rope,
    "attention": _attention,
    "swiglu": _swiglu,
    "block": _block,
}
