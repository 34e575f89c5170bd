"""Gradients of the loss with respect to every weight, beside transformers' and the oracle's."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class WeightGradient:
    """relRMS of one weight's gradient against the oracle's.

    Attributes:
        weight: its name.
        relative: ours, of the worse kernel.
        reference: transformers', of its worse attention (R).
        limit: what ours has to keep to.
        same_bits: whether ours equals transformers' with the same attention, for both.
    """

    weight: str
    relative: float
    reference: float
    limit: float
    same_bits: bool

    @property
    def passed(self) -> bool:
        """Whether it is within the limit; NaN is not."""
        return self.relative <= self.limit


@dataclass(frozen=True)
class Gradients:
    """The gradients of all weights of a model.

    Attributes:
        model: its name.
        dtype: of its weights and activations.
        positions: of the text.
        rows: one for each weight.
    """

    model: str
    dtype: str
    positions: int
    rows: list[WeightGradient]

    @property
    def weights(self) -> int:
        """How many there are."""
        return len(self.rows)

    @property
    def worst(self) -> WeightGradient:
        """The weight that is nearest to its limit."""
        return max(self.rows, key=lambda row: row.relative / row.limit if row.limit else math.inf)

    @property
    def same_bits(self) -> int:
        """How many equal transformers' bit by bit."""
        return sum(row.same_bits for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """The weights over their limit."""
        return [
            f"gradient of {row.weight}: relRMS {row.relative:.2e} is over 2 R = {row.limit:.2e}"
            for row in self.rows
            if not row.passed
        ]


def compare_gradients(model: Llama, ids: Sequence[int]) -> list[WeightGradient]:
    """Judge the gradient of every weight by transformers' own error.

    There is no fixed limit: the gradients of a trained model are sums that nearly cancel, so that
    transformers' own float32 error reaches 4e-4.

    Args:
        model: in float32; its weights and their gradients do not change.
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
                relative=max(relative_error(gradients[name], right) for gradients in ours),
                reference=worst,
                limit=FACTOR[weight.dtype] * worst,
                same_bits=all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)),
            )
        )
    return rows


def _loss(logits: Tensor, ids: Sequence[int]) -> Tensor:
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:], device=logits.device))


def _gradients(network: nn.Module, logits: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
    named = {name.removeprefix("model."): parameter for name, parameter in network.named_parameters()}
    found = torch.autograd.grad(_loss(logits[0], ids), list(named.values()))
    return dict(zip(named, found, strict=True))


def _oracle_gradients(model: Llama, ids: Sequence[int]) -> dict[str, Tensor]:
    weights = {name: p.detach().to(torch.float64).requires_grad_() for name, p in model.named_parameters()}
    logits = oracle_logits(config_fields(model.config), weights, ids)
    return dict(zip(weights, torch.autograd.grad(_loss(logits, ids), list(weights.values())), strict=True))
