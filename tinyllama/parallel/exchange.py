"""What ranks send each other in a forward pass, and what of its gradient they send back.

Where a value that all ranks have goes into the parts that they compute, their gradients add up; where their
parts become one value again, each part's gradient is cut out of the whole. Sums are of all ranks' terms in
rank order, so that they have the same bits on every rank and in every run; the term of a replica (see
`owners`) is left out, because its rank computed the same one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tinyllama.parallel.plan import Parts, owners
from tinyllama.parallel.ranks import Ranks


def spread(x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
    """x, before each rank computes its part from it: `parts` of some dimension. Gradients are added."""
    return _Spread.apply(x, ranks, parts) if x.requires_grad and torch.is_grad_enabled() else x


def join(x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
    """All channels, (..., n), of which rank r has `parts[r]`. Of a gradient, each rank takes its part."""
    return _Join.apply(x, ranks, parts)


def add(x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
    """The sum of all ranks' x, which come from `parts` of some dimension. Every x has the sum's gradient."""
    return _Add.apply(x, ranks, parts)


def begin_stage(x: Tensor, ranks: Ranks, source: int) -> Tensor:
    """x, before the stage whose first rank is `source` computes. Its gradient comes from there."""
    if not torch.is_grad_enabled():
        return x
    # Layers before may have nothing to learn on this rank alone: the gradient is sent all the same.
    return _BeginStage.apply(x if x.requires_grad else x.detach().requires_grad_(), ranks, source)


def end_stage(x: Tensor, ranks: Ranks, source: int) -> Tensor:
    """The x of the stage whose first rank is `source`, on all ranks; every rank has its gradient."""
    return _EndStage.apply(x, ranks, source)


def in_order(terms: list[Tensor]) -> Tensor:
    """((a + b) + c) + ...: addition rounds, so its order decides the bits."""
    total = terms[0]
    for one in terms[1:]:
        total = total + one
    return total


def _sum(x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
    every = ranks.gather(x, [x.shape[-1]] * ranks.size)
    return in_order([every[rank] for rank in owners(parts)])


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
        ctx.ranks, ctx.parts = ranks, parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _sum(gradients[0], ctx.ranks, ctx.parts), None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
        ctx.own = parts[ranks.rank]
        every = ranks.gather(x, [len(part) for part in parts])
        return torch.cat([every[rank] for rank in owners(parts)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0][..., ctx.own.start : ctx.own.stop], None, None


class _Add(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, parts: Parts) -> Tensor:
        return _sum(x, ranks, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


class _BeginStage(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, source: int) -> Tensor:
        ctx.ranks, ctx.source = ranks, source
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.ranks.send(gradients[0], ctx.source), None, None


class _EndStage(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, source: int) -> Tensor:
        return ranks.send(x, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None
