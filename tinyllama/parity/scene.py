"""The values around a divergence, and how far one value is from another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Pairs of a name and a value: the right formula first, under the name "", then one per mistake.
Suspects = Iterator[tuple[str, Tensor]]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """RMS error over the RMS of the truth; inf where shape or mask (-inf) differ, and for NaN."""
    if value.shape != truth.shape:
        return math.inf
    value, visible = value.to(torch.float64), truth != -math.inf
    if not torch.equal(value != -math.inf, visible):
        return math.inf
    if not bool(visible.all()):
        value, truth = value[visible], truth[visible]
    error, size = (value - truth).norm().item(), truth.norm().item()
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Scene:
    """The values around a divergence.

    Attributes:
        address: where the values differ first.
        seen: values of the implementation in question, by address and in float64: those of the layer, and
            under "input" what went into the layer (or, outside the layers, into the operation). Masked scores
            are -inf.
        config: of the right model, as for `oracle_logits`.
        weights: of the right model, as for `oracle_logits`.
        ids: the text.
    """

    address: str
    seen: Mapping[str, Tensor]
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ids: Sequence[int]

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition(".")[2]

    @property
    def observed(self) -> Tensor:
        """The diverging value."""
        return self.seen[self.address]

    def path(self, name: str) -> str:
        """The address of another value of the layer."""
        return name if name == "input" else ".".join([*self.address.split(".")[:2], name])

    def __contains__(self, name: str) -> bool:
        """Whether that value of the layer is known."""
        return self.path(name) in self.seen

    def __getitem__(self, name: str) -> Tensor:
        """That value of the layer."""
        return self.seen[self.path(name)]

    def weight(self, address: str) -> Tensor:
        """A weight in float64."""
        return self.weights[address + ".weight"].to(torch.float64)

    def heads(self, name: str) -> Tensor:
        """A projection, split into heads: (heads, T, D)."""
        return self[name].unflatten(-1, (-1, self.config["head_dim"])).transpose(0, 1)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to another dtype, and return to float64."""
    return x.to(dtype).to(torch.float64)


def short(dtype: torch.dtype) -> str:
    """A dtype without its `torch.`."""
    return str(dtype).removeprefix("torch.")
