"""Healing: train the changed layers for a while, to see how much of the damage goes away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinyllama.errors import InputError
from tinyllama.kernels import kernel_name, kernel_source
from tinyllama.lab.change import Change
from tinyllama.lab.healed import Healed, Settings
from tinyllama.lab.training.steps import MOMENTS, moments, require_window, restore, step, windows
from tinyllama.model import Llama
from tinyllama.parallel.ranks import Ranks


def heal(
    model: Llama,
    change: Change,
    ids: Sequence[int],
    settings: Settings,
    steps: int,
    start: Healed | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Healed]:
    """Train the changed layers, and yield the state after every step.

    The model is changed while the loop runs, and as before after it. The next step overwrites the tensors
    that were yielded: save or copy them. A run resumed halfway gives the same bits as one run in one go, and
    so does any number of ranks: each window's gradient is computed alone. Where processes share the model,
    each trains its parts and yields these: see `whole`.

    Args:
        model: the model.
        change: the kernel, and where it goes.
        ids: the text to learn from.
        settings: how the layers are trained.
        steps: how many steps to reach, those before `start` included.
        start: the state to resume from.
        ranks: this process among several that deal out the windows, each with the whole model
            (`load(..., ranks=ranks, split="whole")`); None: it is alone, or shares the model.

    Raises:
        InputError: the text is shorter than one window, `start` belongs to another model, or the ranks do not
            begin alike, or share a model whose kernel has weights.
    """
    require_window(len(ids), settings.length)
    if ranks is not None:
        code = kernel_source(change.kernel) or "of this package"
        ranks.same("kernel", f"{kernel_name(change.kernel)} (code {code})")
    text = torch.tensor(list(ids))
    with replace(change, weights=start.weights if start else {}).applied(model):
        weights, sharing = trained(model, change), model.sharing
        if sharing is not None and any(".kernel." in name for name in weights):
            raise InputError(
                f"{change.name}: has weights of its own, which every rank would train by its own heads; let "
                "the ranks share the windows instead of the model"
            )
        own = {name: parameter.data for name, parameter in weights.items()}
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for parameter in weights.values():
                parameter.data = _of_rank_0(parameter.data, ranks)
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr)
            losses = list(start.losses) if start else []

            def norm(gradients: list[Tensor]) -> Tensor:
                """Of all gradients; where processes share the model, each has some of them."""
                if sharing is None:
                    return nn.utils.get_total_norm(gradients)
                return sharing.norm({name: one.grad for name, one in weights.items() if one.grad is not None})

            if start:
                kept = start.moments if sharing is None else sharing.parts(start.moments)
                restore(optimizer, weights, kept, len(losses))

            def state() -> Healed:
                return Healed(settings, tuple(losses), _values(weights), moments(optimizer, weights))

            if ranks is not None:
                ranks.same("state to begin with", state().digest)
            while len(losses) < steps:
                rows = windows(text, settings.batch, settings.length, settings.seed, len(losses))
                losses.append(step(model, optimizer, rows, accumulate=len(rows), ranks=ranks, norm=norm))
                yield state()
        finally:
            for name, value in own.items():
                weights[name].data = value
            for parameter, flag in flags.items():
                parameter.grad = None
                parameter.requires_grad_(flag)


def trained(model: Llama, change: Change) -> dict[str, nn.Parameter]:
    """The parameters of the changed layers, those of kernels included, by the names of an unshared model."""
    return {
        name if model.sharing is None else model.sharing.name(name): parameter
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and int(name.split(".")[1]) in change
    }


def whole(healed: Healed, model: Llama) -> Healed:
    """The whole state of a healing, of which this process has a part where several share the model."""
    sharing = model.sharing
    if sharing is None:
        return healed
    # A rank has no moments of a layer that another stage trains, and takes part all the same.
    parts = {
        f"{name}.{moment}": healed.moments.get(f"{name}.{moment}", torch.zeros_like(weight))
        for name, weight in healed.weights.items()
        for moment in MOMENTS
    }
    weights, moments = sharing.whole_weights(healed.weights), sharing.whole_weights(parts)
    return replace(healed, weights=weights, moments=moments)


def _of_rank_0(x: Tensor, ranks: Ranks | None) -> Tensor:
    """A copy; on several ranks, of what rank 0 has: a kernel's own weights may begin at random."""
    if ranks is None:
        return x.clone()
    return ranks.gather(x.reshape(-1), [x.numel()] * ranks.size)[0].view(x.shape).clone()


def _values(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in weights.items()}
