"""Healing: train the changed layers for a while, and see how much of the damage goes away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.errors import InputError
from tinyllama.lab.change import Change
from tinyllama.model import Llama

# Largest norm of all gradients together; a longer one is shortened to it.
CLIP = 1.0
KEY = "healing"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside each weight


@dataclass(frozen=True)
class Settings:
    """How the changed layers are trained, by AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

    Attributes:
        kernel: the change's name.
        layers: that are changed, and so trained; None: all.
        heads: that are changed; None: all.
        text: what is read, by a name or digest; another text is another experiment.
        batch: windows of text in a step.
        length: tokens in a window.
        lr: the learning rate.
        seed: of the windows' places.
    """

    kernel: str
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    text: str
    batch: int = 4
    length: int = 256
    lr: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class Healed:
    """Where a healing stands.

    Attributes:
        settings: how it was trained.
        losses: of each step so far, in nats a token.
        weights: of the changed layers, by name.
        moments: AdamW's running means, by name.
    """

    settings: Settings
    losses: tuple[float, ...]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def heal(
    model: Llama,
    change: Change,
    ids: Sequence[int],
    settings: Settings,
    steps: int,
    start: Healed | None = None,
) -> Iterator[Healed]:
    """Train the changed layers, and yield where it stands after every step.

    Meanwhile the model is the changed one; after the last step, or when the loop is left, it is as before.
    What is yielded goes on changing: save it, or copy it. Each step depends on its number and on what came
    before alone, so a healing that is stopped and gone on with gives the bits of one that was not.

    Args:
        model: the model.
        change: the kernel, and where it goes.
        ids: the text to learn from.
        settings: how.
        steps: until so many are done in all.
        start: where an earlier one stood.

    Raises:
        InputError: the text is shorter than one window, or `start` is of another model.
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
    """The parameters of the changed layers, by name; kernels' own among them."""
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
        if f"{name}.{MOMENTS[0]}" in start.moments:  # else it has never had a gradient
            moments = {
                moment: start.moments[f"{name}.{moment}"].to(parameter.data).clone() for moment in MOMENTS
            }
            optimizer.state[parameter] = {"step": torch.tensor(float(len(start.losses))), **moments}


def save_healed(path: Path, healed: Healed) -> None:
    """Write it by renaming a finished file over `path`.

    Raises:
        InputError: it cannot be written.
    """
    record = {"settings": asdict(healed.settings), "losses": healed.losses}
    tensors = {f"weights.{name}": value for name, value in healed.weights.items()}
    tensors |= {f"moments.{name}": value for name, value in healed.moments.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            save_file(
                {k: v.contiguous().cpu() for k, v in tensors.items()}, partial, {KEY: json.dumps(record)}
            )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({error}); give another place, or make room there"
        ) from error


def load_healed(path: Path) -> Healed:
    """Read what `save_healed` wrote.

    Raises:
        InputError: it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()[KEY])
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a file that heal.py wrote ({error}); give another") from error
    settings = record["settings"]
    for places in ("layers", "heads"):
        settings[places] = None if settings[places] is None else tuple(settings[places])
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    return Healed(Settings(**settings), tuple(record["losses"]), parts["weights"], parts["moments"])
