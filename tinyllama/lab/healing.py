"""Healing: train the changed layers for a while, to see how much of the damage goes away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.errors import InputError
from tinyllama.lab.change import Change
from tinyllama.lab.healed import Healed, Settings
from tinyllama.model import Llama

# Largest norm of all gradients together; larger gradients are scaled down to it.
CLIP = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside each weight


def heal(
    model: Llama,
    change: Change,
    ids: Sequence[int],
    settings: Settings,
    steps: int,
    start: Healed | None = None,
) -> Iterator[Healed]:
    """Train the changed layers, and yield the state after every step.

    The model is changed while the loop runs, and as before after it. The next step overwrites the tensors
    that were yielded: save or copy them. A run resumed halfway gives the same bits as one run in one go.

    Args:
        model: the model.
        change: the kernel, and where it goes.
        ids: the text to learn from.
        settings: how the layers are trained.
        steps: how many steps to reach, those before `start` included.
        start: the state to resume from.

    Raises:
        InputError: the text is shorter than one window, or `start` belongs to another model.
    """
    if len(ids) <= settings.length:
        raise InputError(
            f"text: expected more than {settings.length} tokens to learn from, got {len(ids)}; "
            "give a longer text or a smaller --length"
        )
    text = torch.tensor(list(ids))
    with replace(change, weights=start.weights if start else {}).applied(model):
        weights = trained(model, change)
        own = {name: parameter.data for name, parameter in weights.items()}
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for parameter in weights.values():
                parameter.data = parameter.data.clone()
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr)
            losses = list(start.losses) if start else []
            if start:
                _restore(optimizer, weights, start)
            while len(losses) < steps:
                losses.append(_step(model, optimizer, weights, text, settings, len(losses)))
                yield Healed(settings, tuple(losses), _values(weights), _moments(optimizer, weights))
        finally:
            for name, value in own.items():
                weights[name].data = value
            for parameter, flag in flags.items():
                parameter.grad = None
                parameter.requires_grad_(flag)


def trained(model: Llama, change: Change) -> dict[str, nn.Parameter]:
    """The parameters of the changed layers, those of kernels included, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and int(name.split(".")[1]) in change
    }


def _step(
    model: Llama,
    optimizer: torch.optim.AdamW,
    weights: dict[str, nn.Parameter],
    text: Tensor,
    settings: Settings,
    number: int,
) -> float:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    starts = torch.randint(len(text) - settings.length, (settings.batch, 1), generator=generator)
    window = text[starts + torch.arange(settings.length + 1)].to(model.embed_tokens.weight.device)
    logits = model(window[:, :-1]).flatten(0, 1)  # (B * T, V)
    loss = F.cross_entropy(logits.float(), window[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(weights.values(), CLIP)
    optimizer.step()
    return loss.item()


def _values(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in weights.items()}


def _moments(optimizer: torch.optim.AdamW, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in weights.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def _restore(optimizer: torch.optim.AdamW, weights: dict[str, nn.Parameter], start: Healed) -> None:
    for name, parameter in weights.items():
        saved = {moment: start.moments.get(f"{name}.{moment}") for moment in MOMENTS}
        if any(value is not None for value in saved.values()):  # a parameter without a gradient has none
            moments = {}
            for moment, value in saved.items():
                if value is None or value.shape != parameter.shape:
                    raise InputError(
                        f"{name}.{moment}: expected shape {list(parameter.shape)} to resume from"
                    )
                moments[moment] = value.to(parameter.data).clone()
            optimizer.state[parameter] = {"step": torch.tensor(float(len(start.losses))), **moments}
