"""A rank's model: the project's own, with narrower matrices and a few kinds of layers that talk.

A rank's queries, keys, values, kernel, cache and MLP channels are its own and need no word from others. What
ends a branch needs all of them, so there the ranks talk, and the residual stream is whole on every rank:

    exact   z, gathered -> own rows of o_proj -> gathered      no dot product is cut
    fast    own z -> own columns of o_proj -> gathered and added in rank order      one message instead of two

In a pipeline a rank computes the layers of its stage; at a stage's end, its first rank tells all others.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.model import Block, Llama, RMSNorm
from tinyllama.parallel.exchange import add, begin_stage, end_stage, join, spread
from tinyllama.parallel.plan import Parts, Plan, owners, times
from tinyllama.parallel.ranks import Ranks
from tinyllama.parallel.sharing import Sharing


class Gathered(nn.Module):
    """y = W x with some rows of W on each rank, and all of y on every rank.

    Args:
        own: the product with this rank's rows.
        ranks: this process among the others.
        inputs: which channels of x each rank has; None if all have all of it.
        outputs: which rows of W each rank has.
    """

    def __init__(self, own: nn.Module, ranks: Ranks, inputs: Parts | None, outputs: Parts) -> None:
        super().__init__()
        self.own, self.ranks, self.inputs, self.outputs = own, ranks, inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's part of the inputs) -> (..., out_features)."""
        whole = x if self.inputs is None else join(x, self.ranks, self.inputs)
        return join(self.own(spread(whole, self.ranks, self.outputs)), self.ranks, self.outputs)


class Summed(nn.Module):
    """y = W x with some columns of W on each rank; the partial sums are added in float32, in rank order.

    Args:
        own: the product with this rank's columns.
        ranks: this process among the others.
        inputs: which columns each rank has. A replica's sum is left out.
    """

    def __init__(self, own: nn.Module, ranks: Ranks, inputs: Parts) -> None:
        super().__init__()
        self.own, self.ranks, self.inputs = own, ranks, inputs

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's part of the inputs) -> (..., out_features)."""
        return add(partial_sum(self.own, x), self.ranks, self.inputs).to(x.dtype)


class Spread(nn.Module):
    """What each rank reads to compute its part: the same value, whose gradient is the sum of all ranks'.

    Args:
        own: gives the value, whole on every rank: a norm.
        ranks: this process among the others.
        parts: which part each rank computes from it.
    """

    def __init__(self, own: nn.Module, ranks: Ranks, parts: Parts) -> None:
        super().__init__()
        self.own, self.ranks, self.parts = own, ranks, parts

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return spread(self.own(x), self.ranks, self.parts)


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
        every[self.ranks.rank] = found  # the same, with its gradient
        x = every[0]
        for part, rows in zip(self.parts, every, strict=True):
            x = torch.where((ids >= part.start)[..., None], rows, x)
        return x


class StagedBlock(Block):
    """A decoder layer of a pipeline: the ranks of its stage compute it, the others pass the stream on."""

    def join(self, ranks: Ranks, plan: Plan) -> None:
        """Find this rank's place and the layer's."""
        layer = self.self_attn.layer
        stage, layers = next((n, layers) for n, layers in enumerate(plan.layers) if layer in layers)
        self.ranks, self.source = ranks, stage * plan.each
        self.own = plan.stage(ranks.rank) == stage
        self.first, self.last = layer == layers[0], layer == layers[-1]

    def forward(self, x: Tensor, *about: Any) -> Tensor:
        """As of a block; the stream is true on every rank where a stage ends."""
        if self.first:
            x = begin_stage(x, self.ranks, self.source)
        if self.own:
            x = super().forward(x, *about)
        return end_stage(x, self.ranks, self.source) if self.last else x


def partial_sum(columns: nn.Module, x: Tensor) -> Tensor:
    """The product of some columns and their channels, float32 at least."""
    if isinstance(columns, nn.Linear) and columns.weight.dtype.itemsize < 4:
        return F.linear(x.float(), columns.weight.float())  # PyTorch would round the sum to 16 bits
    return columns(x.to(torch.promote_types(x.dtype, torch.float32)))


def narrow(model: Llama, plan: Plan, rank: int) -> None:
    """Leave each weight only the rank's part, as a view; for a model on the meta device, a shape."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, RMSNorm)):
            cut = plan.cut(f"{path}.weight")
            weight = module.weight.detach()[cut.place(rank)]
            # As before: of a weight without gradients, PyTorch may round the product in another way.
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = weight.shape
            elif isinstance(module, nn.Embedding):
                module.num_embeddings = len(weight)
    model.tie_weights()


def connect(model: Llama, plan: Plan, ranks: Ranks) -> None:
    """Give a narrow model the layers that talk, and tell it what is its own."""
    stage = ranks.divide(plan.stages)
    channels = times(plan.heads, plan.config.head_dim)

    def end(linear: nn.Module, inputs: Parts) -> nn.Module:
        if plan.mode == "exact":
            return Gathered(linear, stage, inputs, plan.hidden)
        return Summed(linear, stage, inputs)

    for block in model.layers:
        assert isinstance(block, Block)
        block.self_attn.heads = plan.heads[stage.rank]
        block.self_attn.set_submodule("o_proj", end(block.self_attn.o_proj, channels))
        block.mlp.set_submodule("down_proj", end(block.mlp.down_proj, plan.mlp))
        block.set_submodule("input_layernorm", Spread(block.input_layernorm, stage, plan.heads))
        norm = Spread(block.post_attention_layernorm, stage, plan.mlp)
        block.set_submodule("post_attention_layernorm", norm)
        if plan.stages > 1:
            block.__class__ = StagedBlock
            cast(StagedBlock, block).join(ranks, plan)
    table = SharedEmbedding(model.embed_tokens.weight, ranks, plan.vocabulary)
    model.set_submodule("embed_tokens", table)
    model.set_submodule("lm_head", Gathered(model.lm_head, ranks, None, plan.vocabulary))
    model.sharing = Sharing(plan, ranks, stage)
    if owners(plan.kv_heads) != owners(plan.heads):
        model.requires_grad_(False)  # a rank would see a part of the gradient of the KV heads that it shares
