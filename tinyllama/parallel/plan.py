"""Which part of each weight a rank has: a pure function of the config and the number of ranks.

Layers are dealt out to stages, and to each stage as many ranks, which cut its matrices. One stage is usual:
every rank has a part of all layers. The embedding and the head are cut over all ranks.

Heads are dealt out in whole KV groups: a rank has some KV heads and all query heads that read them. Where
there are more ranks than KV heads, several ranks have the same KV head. In the exact split they all compute
the whole group, and the first of them counts: PyTorch's sdpa gives other bits for a part of a group. In the
fast split they share its query heads, as far as these go round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError

MODES = ("exact", "fast")
# Rows that stay together. In multiples of 16 PyTorch's float32 products kept their bits, in multiples of 32
# its bfloat16 ones. In multiples of 64, a part of the MLP can be the columns of a compiled product, and its
# 8-bit weights have whole groups.
ROWS, WIDTH = 32, 64

# A dimension's part for every rank, in order.
Parts = tuple[range, ...]


@dataclass(frozen=True)
class Cut:
    """How a weight is dealt out: rank r has `parts[r]` of `axis`. Axis None: every rank has all of it."""

    axis: int | None
    parts: Parts = ()

    def shape(self, whole: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of a rank's part."""
        return tuple(len(self.parts[rank]) if i == self.axis else n for i, n in enumerate(whole))

    def place(self, rank: int) -> tuple[slice, ...]:
        """Where a rank's part is in the whole: an index."""
        if self.axis is None:
            return (slice(None),)
        part = self.parts[rank]
        return (slice(None),) * self.axis + (slice(part.start, part.stop),)


@dataclass(frozen=True)
class Plan:
    """Who has what.

    Attributes:
        config: of the model.
        ranks: how many there are.
        stages: of layers; each has as many ranks.
        mode: "exact" cuts every matrix by output rows, so no dot product is cut. "fast" cuts those that end a
            branch (o_proj, down_proj) by input columns: half as many messages, other rounding.
        layers: by stage.
        heads: query heads, by rank of a stage.
        kv_heads: KV heads, by rank of a stage.
        mlp: channels inside the MLP, by rank of a stage.
        hidden: channels of the residual stream that a rank of a stage computes in exact mode.
        vocabulary: ids, by rank: rows of the embedding and of the head, so that a tied one stays one tensor.
    """

    config: LlamaConfig
    ranks: int
    stages: int
    mode: str
    layers: Parts
    heads: Parts
    kv_heads: Parts
    mlp: Parts
    hidden: Parts
    vocabulary: Parts

    @staticmethod
    def of(config: LlamaConfig, ranks: int, mode: str = "exact", stages: int = 1) -> Plan:
        """The plan for that many ranks.

        Raises:
            InputError: there is no such mode, no rank, or a rank would have nothing to compute.
        """
        L = config.num_hidden_layers
        if not 1 <= stages <= L or ranks % stages:
            raise InputError(
                f"pipeline: expected 1 to {L} stages, as many as layers at most, that divide {ranks} ranks "
                f"evenly, got {stages}"
            )
        most = min(config.vocab_size, config.hidden_size, config.intermediate_size)
        if not 1 <= ranks <= most:
            raise InputError(f"ranks: expected 1 to {most}, the model's smallest width, got {ranks}")
        if mode not in MODES:
            raise InputError(f"split: expected {' or '.join(MODES)}, got {mode!r}")
        each = ranks // stages
        heads, kv_heads = _heads(
            config.num_attention_heads, config.num_key_value_heads, each, mode == "exact"
        )
        return Plan(
            config,
            ranks,
            stages,
            mode,
            shares(L, stages),
            heads,
            kv_heads,
            mlp=shares(config.intermediate_size, each, WIDTH),
            hidden=shares(config.hidden_size, each, ROWS),
            vocabulary=shares(config.vocab_size, ranks, ROWS),
        )

    @property
    def each(self) -> int:
        """How many ranks a stage has."""
        return self.ranks // self.stages

    def stage(self, rank: int) -> int:
        """The stage of a rank."""
        return rank // self.each

    def cut(self, name: str) -> Cut:
        """How the weight of that name is dealt out, and what goes with it (`name.exp_avg`)."""
        D, (*path, kind) = self.config.head_dim, name.partition(".weight")[0].split(".")
        own_heads = times(self.heads, D)
        exact = self.mode == "exact"
        cut = {
            "q_proj": Cut(0, own_heads),
            "k_proj": Cut(0, times(self.kv_heads, D)),
            "v_proj": Cut(0, times(self.kv_heads, D)),
            "o_proj": Cut(0, self.hidden) if exact else Cut(1, own_heads),
            "gate_proj": Cut(0, self.mlp),
            "up_proj": Cut(0, self.mlp),
            "down_proj": Cut(0, self.hidden) if exact else Cut(1, self.mlp),
            "embed_tokens": Cut(0, self.vocabulary),
            "lm_head": Cut(0, self.vocabulary),
        }.get(kind, Cut(None))
        if self.stages == 1 or path[:1] != ["layers"]:
            return cut
        there = cut.parts or (range(self.config.hidden_size),) * self.each  # a norm is whole
        elsewhere, layer = (range(0),) * self.each, int(path[1])
        parts = [there if layer in layers else elsewhere for layers in self.layers]
        return Cut(cut.axis or 0, tuple(chain(*parts)))

    def places(self, names: Iterable[str], rank: int) -> dict[str, tuple[slice, ...]]:
        """Where a rank's part of each weight is; see `Cut.place`."""
        return {name: self.cut(name).place(rank) for name in names}

    def parameters(self, shapes: Mapping[str, Sequence[int]], rank: int) -> int:
        """How many numbers a rank has of weights of these shapes."""
        return sum(math.prod(self.cut(name).shape(shape, rank)) for name, shape in shapes.items())

    def received(self, itemsize: int, rank: int = 0) -> int:
        """Bytes that a rank receives for one token, with activations of that size; see `layers`."""
        C, layers, others = self.config.hidden_size, self.layers[self.stage(rank)], self.each - 1
        if self.mode == "exact":
            z, mlp, hidden = (_widest(parts) for parts in (self.heads, self.mlp, self.hidden))
            layer = (z * self.config.head_dim + mlp + 2 * hidden) * itemsize
        else:
            layer = 2 * C * max(itemsize, 4)  # partial sums, in float32 at least
        ends = (self.ranks - 1) * (C + _widest(self.vocabulary)) * itemsize
        # After each stage its first rank tells all others.
        stages = 0 if self.stages == 1 else self.stages - (rank % self.each == 0)
        return others * len(layers) * layer + ends + stages * C * itemsize


def _widest(parts: Parts) -> int:
    """What every rank sends: narrower parts are filled up."""
    return max(map(len, parts))


def shares(total: int, ranks: int, unit: int = 1) -> Parts:
    """0 to `total` in as even parts as whole units allow; in smaller units where they would not go round."""
    while unit > 1 and total // unit < ranks:
        unit //= 2
    units = -(-total // unit)
    ends = [min(total, unit * (units * rank // ranks)) for rank in range(ranks + 1)]
    return tuple(map(range, ends[:-1], ends[1:]))


def times(parts: Parts, size: int) -> Parts:
    """The same parts of a dimension with `size` numbers for each: the rows of some heads."""
    return tuple(range(part.start * size, part.stop * size) for part in parts)


def owners(parts: Parts) -> list[int]:
    """The ranks whose parts together are the whole: of equal parts, the first."""
    return [rank for rank, part in enumerate(parts) if rank == 0 or part != parts[rank - 1]]


def _heads(H: int, K: int, ranks: int, whole_groups: bool) -> tuple[Parts, Parts]:
    """Query heads and KV heads of every rank."""
    G = H // K
    if ranks <= K:
        kv_heads = shares(K, ranks)
        return times(kv_heads, G), kv_heads
    heads: list[range] = []
    kv_heads_of: list[range] = []
    for head, sharing in enumerate(shares(ranks, K)):  # these ranks have this KV head
        n = len(sharing)
        if whole_groups:
            own: Parts = (range(G),) * n
        else:
            own = shares(G, n) if n <= G else tuple(range(i * G // n, i * G // n + 1) for i in range(n))
        heads += [range(head * G + part.start, head * G + part.stop) for part in own]
        kv_heads_of += [range(head, head + 1)] * n
    return tuple(heads), tuple(kv_heads_of)
