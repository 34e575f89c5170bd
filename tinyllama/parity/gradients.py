"""Gradients of the loss with respect to every weight, beside transformers' and the oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity.measure import FACTOR
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.scene import relative_error

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class WeightGradient:
    """relRMS of one weight's gradient against the oracle's.

    Attributes:
        weight: its name.
        error: ours, of the worse kernel.
        reference: transformers', of its worse attention (R).
        limit: what ours has to keep to.
        same_bits: whether ours equals transformers' with the same attention, for both.
    """

    weight: str
    error: float
    reference: float
    limit: float
    same_bits: bool

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit


def compare_gradients(model: Llama, ids: Sequence[int]) -> list[WeightGradient]:
    """Judge the gradient of every weight as logits are judged: by transformers' own error.

    There is no absolute limit: on a trained model, whose gradients are sums that nearly cancel, transformers'
    own float32 error reaches 4e-4.

    Args:
        model: in float32; its weights and their gradients are as before afterwards.
        ids: the text whose mean next-token loss is differentiated.
    """
    weight = model.embed_tokens.weight
    batch = torch.tensor([ids], device=weight.device)
    truth = _oracle_gradients(model, ids)
    ours, theirs = [], []
    for name, kernel in KERNELS.items():
        model.set_attention(kernel)
        ours.append(_gradients(model, model(batch), ids))
        reference = reference_model(model, name)
        theirs.append(_gradients(reference, reference(batch).logits, ids))
    rows = []
    for name, right in truth.items():
        worst = max(relative_error(gradients[name], right) for gradients in theirs)
        rows.append(
            WeightGradient(
                weight=name,
                error=max(relative_error(gradients[name], right) for gradients in ours),
                reference=worst,
                limit=FACTOR[weight.dtype] * worst,
                same_bits=all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)),
            )
        )
    return rows


def _loss(logits: Tensor, ids: Sequence[int]) -> Tensor:
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:], device=logits.device))


def _gradients(network: nn.Module, logits: Tensor, ids: Sequence[int]) -> Gradients:
    named = {name.removeprefix("model."): parameter for name, parameter in network.named_parameters()}
    found = torch.autograd.grad(_loss(logits[0], ids), list(named.values()))
    return dict(zip(named, found, strict=True))


def _oracle_gradients(model: Llama, ids: Sequence[int]) -> Gradients:
    weights = {name: p.detach().to(torch.float64).requires_grad_() for name, p in model.named_parameters()}
    logits = oracle_logits(config_fields(model.config), weights, ids)
    return dict(zip(weights, torch.autograd.grad(_loss(logits, ids), list(weights.values())), strict=True))
