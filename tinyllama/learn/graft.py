"""Put a learner's functions into a trained model, and let it write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tinyllama.attention
from tinyllama.attention import AttentionContext, AttentionMask
from tinyllama.cache import KVCache
from tinyllama.learn import ours
from tinyllama.learn.judge import Function, TimeIsUp, as_tensor, time_limit, using
from tinyllama.learn.mistakes import sub
from tinyllama.model import MLP, Llama, RMSNorm

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
    """Let the model compute with these functions of embedding, norm, RoPE, attention, MLP and block."""
    config = model.config
    seen: dict[str, Tensor] = {}  # the positions of the pass that runs
    changes: list[tuple[Any, str, Any]] = []

    def change(module: nn.Module, forward: Callable[..., Any]) -> None:
        changes.append((module, "forward", forward))

    def rows(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack([as_tensor(function(row)).to(row.dtype) for row in x])

    if f := functions.get("embedding"):
        table = model.embed_tokens.weight

        def embed(ids: Tensor, f: Function = f) -> Tensor:
            return torch.stack([as_tensor(f(row, table)).to(table.dtype) for row in ids])

        change(model.embed_tokens, embed)
    if f := functions.get("frequencies"):
        speeds = as_tensor(f(config.head_dim, config.rope_theta)).float()
        changes.append((model.rotary, "frequencies", lambda dtype, device: speeds.to(dtype)))
    if f := functions.get("rope"):
        before = model.rotary.forward

        def note(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            seen["positions"] = positions
            return before(positions, dtype)

        def rotate(x: Tensor, cos: Tensor, sin: Tensor, f: Function = f) -> Tensor:
            speeds = model.rotary.frequencies(torch.float32, x.device)
            turned = [as_tensor(f(*one, speeds)) for one in zip(x, seen["positions"], strict=True)]
            return torch.stack(turned).to(x.dtype)

        change(model.rotary, note)
        changes.append((tinyllama.attention, "rotate", rotate))
    if f := functions.get("attention"):

        def kernel(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, f: Function = f) -> Tensor:
            return torch.stack([as_tensor(f(*one)) for one in zip(q, k, v, strict=True)]).to(q.dtype)

        changes += [(attention, "kernel", kernel) for attention in model.attentions]
    for module in model.modules():
        if isinstance(module, RMSNorm) and (f := functions.get("rms_norm")):
            change(module, rows(partial(_norm, f, module)))
        if isinstance(module, MLP) and (f := functions.get("swiglu")):
            change(module, rows(partial(_mlp, f, module)))
    if f := functions.get("block"):
        for n, layer in enumerate(model.layers):
            weights = sub(model.state_dict(), f"layers.{n}.")

            def block(
                x: Tensor, _rotation: Any, mask: AttentionMask, cache: KVCache, f: Function = f, n: int = n,
                weights: Mapping[str, Tensor] = weights,
            ) -> Tensor:  # fmt: skip
                def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                    keys, values = cache.write(n, mask, k[None], v[None])
                    return keys[0], values[0]

                return as_tensor(f(x[0], weights, config, mask.query_positions[0], remember))[None].to(
                    x.dtype
                )

            change(layer, block)
    before_values = [(thing, name, vars(thing).get(name)) for thing, name, _ in changes]
    try:
        for thing, name, value in changes:
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, old in before_values:
            if old is None:
                delattr(thing, name)
            else:
                setattr(thing, name, old)


def _norm(function: Function, module: RMSNorm, x: Tensor) -> Any:
    return function(x, module.weight, module.eps)


def _mlp(function: Function, module: MLP, x: Tensor) -> Any:
    return function(x, module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
