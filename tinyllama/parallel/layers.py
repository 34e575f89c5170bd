"""A rank's model: the project's own, with narrower matrices and three kinds of layers that talk.

A rank's queries, keys, values, kernel, cache and MLP channels are its own and need no word from others. What
ends a branch needs all of them, so there the ranks talk, and the residual stream is whole on every rank:

    exact   z, gathered -> own rows of o_proj -> gathered      no dot product is cut
    fast    own z -> own columns of o_proj -> gathered and added in rank order      one message instead of two
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.model import MLP, Llama
from tinyllama.parallel.plan import Parts, Plan, owners, times
from tinyllama.parallel.ranks import Ranks


class Gathered(nn.Module):
    """y = W x with some rows of W on each rank, and all of y on every rank.

    Args:
        rows: the product with this rank's rows.
        ranks: this process among the others.
        inputs: which channels of x each rank has; None if all have all of it.
        outputs: which rows of W each rank has.
    """

    def __init__(self, rows: nn.Module, ranks: Ranks, inputs: Parts | None, outputs: Parts) -> None:
        super().__init__()
        self.rows, self.ranks, self.inputs, self.outputs = rows, ranks, inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's part of the inputs) -> (..., out_features)."""
        whole = x if self.inputs is None else self.ranks.join(x, self.inputs)
        return self.ranks.join(self.rows(whole), self.outputs)


class Summed(nn.Module):
    """y = W x with some columns of W on each rank; the partial sums are added in float32, in rank order.

    Args:
        columns: the product with this rank's columns.
        ranks: this process among the others.
        inputs: which columns each rank has. A replica's sum is left out.
    """

    def __init__(self, columns: nn.Module, ranks: Ranks, inputs: Parts) -> None:
        super().__init__()
        self.columns, self.ranks, self.inputs = columns, ranks, inputs

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's part of the inputs) -> (..., out_features)."""
        partial = partial_sum(self.columns, x)
        every = self.ranks.gather(partial, [partial.shape[-1]] * self.ranks.size)
        return in_order([every[rank] for rank in owners(self.inputs)]).to(x.dtype)


class SharedEmbedding(nn.Module):
    """A table of which each rank has the rows of some ids.

    Rows, not columns: they lie together in the file, and a tied head, which is cut by rows as well, stays the
    same tensor. Each rank looks up its own ids, and the row of the id's owner is taken; nothing is added, so
    every bit is that of the table.

    Args:
        weight: this rank's rows.
        ranks: this process among the others.
        parts: which ids each rank has.
    """

    def __init__(self, weight: Tensor, ranks: Ranks, parts: Parts) -> None:
        super().__init__()
        self.weight, self.ranks, self.parts = weight, ranks, parts

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        own = self.parts[self.ranks.rank]
        of_others = ((ids >= 0) & (ids < own.start)) | ((ids >= own.stop) & (ids < self.parts[-1].stop))
        found = F.embedding((ids - own.start).masked_fill(of_others, 0), self.weight)
        every = self.ranks.gather(found, [found.shape[-1]] * self.ranks.size)
        x = every[0]
        for part, rows in zip(self.parts, every, strict=True):
            x = torch.where((ids >= part.start)[..., None], rows, x)
        return x


def partial_sum(columns: nn.Module, x: Tensor) -> Tensor:
    """The product of some columns and their channels, float32 at least."""
    if isinstance(columns, nn.Linear) and columns.weight.dtype.itemsize < 4:
        return F.linear(x.float(), columns.weight.float())  # PyTorch would round the sum to 16 bits
    return columns(x.to(torch.promote_types(x.dtype, torch.float32)))


def in_order(sums: list[Tensor]) -> Tensor:
    """((a + b) + c) + ...: addition rounds, so its order decides the bits."""
    total = sums[0]
    for one in sums[1:]:
        total = total + one
    return total


def narrow(model: Llama, plan: Plan, rank: int) -> None:
    """Leave each weight only the rank's part, as a view; for a model on the meta device, a shape."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            cut = plan.cut(f"{path}.weight")
            weight = module.weight.detach()[cut.place(rank)]
            # As before: of a weight without gradients, PyTorch may round the product in another way.
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = weight.shape
            else:
                module.num_embeddings = len(weight)
    model.tie_weights()


def connect(model: Llama, plan: Plan, ranks: Ranks) -> None:
    """Give a narrow model the layers that talk, and tell it which heads are its own."""
    model.kv_heads = len(plan.kv_heads[ranks.rank])
    channels = times(plan.heads, plan.config.head_dim)

    def end(linear: nn.Module, inputs: Parts) -> nn.Module:
        if plan.mode == "exact":
            return Gathered(linear, ranks, inputs, plan.hidden)
        return Summed(linear, ranks, inputs)

    for attention in model.attentions:
        attention.heads = plan.heads[ranks.rank]
        attention.set_submodule("o_proj", end(attention.o_proj, channels))
    for mlp in (module for module in model.modules() if isinstance(module, MLP)):
        mlp.set_submodule("down_proj", end(mlp.down_proj, plan.mlp))
    table = SharedEmbedding(model.embed_tokens.weight, ranks, plan.vocabulary)
    model.set_submodule("embed_tokens", table)
    model.set_submodule("lm_head", Gathered(model.lm_head, ranks, None, plan.vocabulary))
    model.agree = ranks.agree  # type: ignore[method-assign]
