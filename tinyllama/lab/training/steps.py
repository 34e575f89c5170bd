"""Training by AdamW on windows of a text: the steps that healing and training from scratch share.

A step's windows follow from the seed and its number alone, so every kernel reads the same ones in the same
order, and a run resumed halfway gives the same bits as one run in one go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.parallel.ranks import Ranks

# Largest norm of all gradients together; larger gradients are scaled down to it.
CLIP = 1.0
Norm = Callable[[list[Tensor]], Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside each weight


@dataclass(frozen=True)
class Schedule:
    """The learning rate: a line up from 0, then half a cosine down (SGDR, arXiv:1608.03983).

    Attributes:
        peak: the largest.
        steps: of the whole run.
        warm_up: steps of the line.
        final: the share of the peak at the end.
    """

    peak: float
    steps: int
    warm_up: int = 0
    final: float = 0.1

    def at(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warm_up:
            return self.peak * (step + 1) / self.warm_up
        way = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return self.peak * (self.final + (1 - self.final) * (1 + math.cos(math.pi * way)) / 2)


def require_window(tokens: int, length: int) -> None:
    """Raise InputError if a text has not one window of that many tokens and the one after them."""
    if tokens <= length:
        raise InputError(
            f"text: expected more than {length} tokens to learn from, got {tokens}; "
            "give a longer text or a smaller --length"
        )


def windows(text: Tensor, batch: int, length: int, seed: int, number: int) -> Tensor:
    """The windows of a step, (batch, length + 1): each token is to be predicted from those before it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


def step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    rows: Tensor,
    *,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    ranks: Ranks | None = None,
    norm: Norm = nn.utils.get_total_norm,
) -> float:
    """One step of an optimizer over the windows; returns the mean loss in nats a token.

    Several ranks, each with the whole model, deal out the parts in turn. Gradients are added part by part in
    their order, whoever computed them: the same parts give the same bits on any number of ranks. (PyTorch's
    DDP and `fully_shard` add those of each rank first.)

    Args:
        model: gives logits (B, T, V) for ids (B, T); is called once for each part of the windows.
        optimizer: of the weights that learn.
        rows: (B, T + 1).
        accumulate: in how many parts the windows are read; more parts need less memory.
        autocast: compute in this dtype where PyTorch finds it safe.
        ranks: this process among those that share the step; None: it is alone.
        norm: of all gradients together.
    """
    device, total = next(model.parameters()).device, 0.0
    parts = rows.to(device).chunk(accumulate)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    sums: dict[nn.Parameter, Tensor] = {}
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    for first in range(0, len(parts), size):
        counted = min(size, len(parts) - first)
        part = parts[first + min(rank, counted - 1)]  # where too few are left, the last ones compute in vain
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model(part[:, :-1]).flatten(0, 1)  # (B * T, V)
        share = len(part) / len(rows)
        loss = F.cross_entropy(logits.float(), part[:, 1:].flatten()) * share
        loss.backward()
        # A kernel may leave a weight of its own unused: to AdamW that is not a gradient of zeros.
        mine = [loss.item(), *(weight.grad is not None for weight in weights)]
        told = _of_every_rank(torch.tensor(mine, dtype=torch.float64), ranks)[:counted]
        losses, *uses = torch.stack(told).T.tolist()
        for one in losses:
            total += one
        for weight, used in zip(weights, uses, strict=True):
            if any(used):
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                for gradient, counts in zip(_of_every_rank(own, ranks), used, strict=False):
                    if counts and weight in sums:
                        sums[weight].add_(gradient)
                    elif counts:  # without the other ranks' gradients, which lie beside it
                        sums[weight] = gradient if ranks is None else gradient.clone()
    for weight, gradient in sums.items():
        weight.grad = gradient
    nn.utils.clip_grads_with_norm_(sums, CLIP, norm(list(sums.values())))
    optimizer.step()
    return total


def _of_every_rank(x: Tensor, ranks: Ranks | None) -> list[Tensor]:
    """Every rank's x, in order."""
    if ranks is None:
        return [x]
    flat = x.to(ranks.device).reshape(-1)
    return [one.view(x.shape) for one in ranks.gather(flat, [len(flat)] * ranks.size)]


def saved_bytes(model: Llama, rows: Tensor, autocast: torch.dtype | None = None) -> int:
    """Bytes of activations that a step keeps for its backward pass, weights not counted.

    Args:
        model: is called once, and not compiled.
        rows: (B, T + 1), the windows that are read at once.
        autocast: as in `step`.
    """
    device = model.embed_tokens.weight.device
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # several values may be views of one storage

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    rows = rows.to(device)
    # The graph is held to the end: memory that is free again would be counted twice.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model(rows[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), rows[:, 1:].flatten())
    del loss
    return sum(kept.values())


def moments(optimizer: torch.optim.AdamW, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's running means by the names of the weights, to be kept with them."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in weights.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def restore(
    optimizer: torch.optim.AdamW, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], steps: int
) -> None:
    """Put the running means back, after that many steps.

    Raises:
        InputError: they belong to other weights.
    """
    for name, parameter in weights.items():
        saved = {moment: kept.get(f"{name}.{moment}") for moment in MOMENTS}
        if any(value is not None for value in saved.values()):  # a parameter without a gradient has none
            back = {}
            for moment, value in saved.items():
                if value is None or value.shape != parameter.shape:
                    raise InputError(
                        f"{name}.{moment}: expected shape {list(parameter.shape)} to resume from"
                    )
                back[moment] = value.to(parameter.data).clone()
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **back}
