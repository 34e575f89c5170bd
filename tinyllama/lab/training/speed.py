"""How fast training is by each attention, and by transformers: steps timed in turn, in one run."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

from tinyllama.attention import Kernel
from tinyllama.lab.training.from_scratch import Recipe
from tinyllama.lab.training.steps import step, windows
from tinyllama.model import Llama

ROUNDS = 7  # the first warms up
PEER = "transformers"


class Logits(nn.Module):
    """transformers' model, called as ours is: ids (B, T) -> logits (B, T, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """What the wrapped model gives out, without a cache."""
        return self.model(ids, use_cache=False).logits


def speeds(
    model: Llama, kernels: Mapping[str, Kernel], text: Tensor, recipe: Recipe, *, peer: bool = False
) -> dict[str, float]:
    """Tokens a second of training by each kernel: medians of steps that are timed in turn.

    Args:
        model: a copy of it is made for each kernel.
        kernels: by name.
        text: ids to learn from.
        recipe: how.
        peer: also of transformers' model with the same weights and its sdpa, as PEER.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    models: dict[str, nn.Module] = {}
    for name, kernel in kernels.items():
        ours = copy.deepcopy(model)
        ours.set_attention(kernel)
        models[name] = ours
    if peer:
        from tinyllama.parity.reference import reference_model  # here, because it imports transformers

        models[PEER] = Logits(reference_model(copy.deepcopy(model), "sdpa").train())
    optimizers = {name: torch.optim.AdamW(own.parameters(), lr=recipe.lr) for name, own in models.items()}
    autocast = None if recipe.autocast is None else getattr(torch, recipe.autocast)
    times: dict[str, list[float]] = {name: [] for name in models}
    for own in models.values() if recipe.compiled else ():
        own.compile()
    for number in range(ROUNDS):
        for name, own in models.items():
            rows = windows(text, recipe.batch, recipe.length, 0, number)
            start = time.perf_counter()
            step(own, optimizers[name], rows, accumulate=recipe.accumulate, autocast=autocast)
            times[name].append(time.perf_counter() - start)
    return {name: recipe.batch * recipe.length / median(own[1:]) for name, own in times.items()}
