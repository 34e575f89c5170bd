"""Greedy and sampled decoding, each twice; and what recording gradients costs in a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tinyllama.generation import generate
from tinyllama.model import Llama
from tinyllama.text.tokenizer import Tokenizer

PASSES = 5
MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "torch.enable_grad()": torch.enable_grad,
    "torch.no_grad()": torch.no_grad,
    "torch.inference_mode()": torch.inference_mode,
}


@dataclass(frozen=True)
class Pair:
    """The texts of two runs with the same settings, and whether their ids are the same."""

    texts: list[str]
    identical: bool


@dataclass(frozen=True)
class PassCost:
    """A forward pass: activation bytes that autograd saves for a backward pass, and the median time."""

    saved_bytes: int
    median_seconds: float


@dataclass(frozen=True)
class Decodings:
    """Pairs by the way of choosing tokens, and costs of a pass over `pass_tokens` by gradient mode."""

    prompt: str
    settings: dict[str, Any]
    decoding: dict[str, Pair]
    pass_tokens: int
    passes: dict[str, PassCost]


def compare_decodings(model: Llama, tokenizer: Tokenizer, prompt: str, settings: dict[str, Any]) -> Decodings:
    """Continue the prompt greedily, sampled without a seed, and sampled with the seed of the settings.

    The passes go over the prompt and the greedy text.
    """
    ids = tokenizer.encode(prompt)
    ways = {
        "greedy": settings | {"temperature": 0.0},
        "no seed": settings | {"seed": None},
        "seed": settings,
    }
    runs = {name: [generate(model, [ids], **way)[0] for _ in range(2)] for name, way in ways.items()}
    text = ids + runs["greedy"][0]
    return Decodings(
        prompt,
        settings,
        {
            name: Pair([tokenizer.decode(new, skip_special=True) for new in pair], pair[0] == pair[1])
            for name, pair in runs.items()
        },
        len(text),
        compare_modes(model, torch.tensor([text], device=model.lm_head.weight.device)),
    )


def compare_modes(model: Llama, ids: Tensor) -> dict[str, PassCost]:
    """The cost of a forward pass in each gradient mode; the modes take turns."""
    saved = {name: saved_bytes(model, ids, mode) for name, mode in MODES.items()}  # a warm-up too
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(PASSES):
        for name, mode in MODES.items():
            start = time.perf_counter()
            with mode():
                model(ids)
                if ids.is_cuda:
                    torch.cuda.synchronize(ids.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: PassCost(saved[name], statistics.median(seconds[name])) for name in MODES}


def saved_bytes(model: Llama, ids: Tensor, mode: Callable[[], AbstractContextManager[None]]) -> int:
    """Bytes of the storages that autograd saves in a forward pass, each counted once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # saving the tensor itself would make a reference cycle through its graph

    with saved_tensors_hooks(count, lambda tensor: tensor), mode():
        logits = model(ids)
    del logits  # until here they keep the graph alive, so that no address is used twice
    return sum(saved.values())
