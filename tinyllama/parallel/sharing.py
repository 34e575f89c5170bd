"""What a shared model knows of its parts: where each value and weight is, and how it becomes whole again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyllama import hooks
from tinyllama.parallel.exchange import in_order, join, spread
from tinyllama.parallel.plan import Parts, Plan, owners, times
from tinyllama.parallel.ranks import Ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sharing:
    """Who has what of one model.

    Attributes:
        plan: of all weights.
        ranks: this process among all.
        stage: this process among the ranks of its stage.
    """

    plan: Plan
    ranks: Ranks
    stage: Ranks

    @property
    def layers(self) -> range:
        """The layers that this rank computes."""
        return self.plan.layers[self.plan.stage(self.ranks.rank)]

    @property
    def kv_heads(self) -> range:
        """The KV heads that this rank has of each of its layers."""
        return self.plan.kv_heads[self.stage.rank]

    # Values, by address (see hooks.py)

    def stage_of(self, address: str) -> int | None:
        """The stage that computes the value at an address; None: every rank does."""
        top, _, rest = address.partition(".")
        if top != "layers" or self.plan.stages == 1:
            return None
        layer = int(rest.partition(".")[0])
        return next(stage for stage, layers in enumerate(self.plan.layers) if layer in layers)

    def computes(self, address: str) -> bool:
        """Whether this rank computes the value at an address, or its part of it."""
        return self.stage_of(address) in (None, self.plan.stage(self.ranks.rank))

    def whole(self, address: str, value: Tensor) -> Tensor:
        """The whole value at an address, of which this rank has a part; on every rank of its stage."""
        axis, parts = self._parts(address)
        if parts is None:
            return value
        # As in one process it lies in one piece: the order of the sums that are made of it depends on that.
        return join(value.movedim(axis, -1), self.stage, parts).movedim(-1, axis).contiguous()

    def part(self, address: str, whole: Tensor) -> Tensor:
        """The part of a whole value that this rank computes."""
        axis, parts = self._parts(address)
        if parts is None:
            return whole
        own = parts[self.stage.rank]
        return whole.narrow(axis, own.start, len(own))

    def spread(self, address: str, whole: Tensor) -> Tensor:
        """A whole value, before each rank computes its part from it."""
        _, parts = self._parts(address)
        return whole if parts is None else spread(whole, self.stage, parts)

    def complete(self, values: dict[str, Any], addresses: Iterable[str]) -> None:
        """Make the values of a pass whole, on all ranks; what nobody computed stays away, or None.

        Every rank must call it with the same addresses, in the same order. In a pipeline, what is sent has no
        gradient.
        """
        device = self.ranks.device
        for address in addresses:
            value, stage = values.get(address) if self.computes(address) else None, self.stage_of(address)
            if value is not None:
                values[address] = value = self.whole(address, value)
            if stage is None:
                continue
            source, about = stage * self.plan.each, [-1] * 6  # the dtype and the shape
            if value is not None:
                about[: 1 + value.dim()] = [DTYPES.index(value.dtype), *value.shape]
            dtype, *sizes = self.ranks.send(torch.tensor(about, device=device), source).tolist()
            if dtype < 0:
                continue
            shape = [n for n in sizes if n >= 0]
            room = torch.empty(shape, dtype=DTYPES[dtype], device=device) if value is None else value.detach()
            values.pop(address, None)  # so that all ranks have the same order
            values[address] = self.ranks.send(room, source)

    def _parts(self, address: str) -> tuple[int, Parts | None]:
        """The axis along which the ranks of a stage have parts of a value, and the parts."""
        plan = self.plan
        cuts = {"H": plan.heads, "K": plan.kv_heads, "F": plan.mlp}
        for axis, name in enumerate(hooks.shape(address).split()):
            letter, _, by_head = name.partition("*")
            if letter in cuts:
                return axis, times(cuts[letter], plan.config.head_dim) if by_head else cuts[letter]
        return 0, None

    # Figures

    def union(self, figures: Tensor) -> Tensor:
        """Figures of all layers and heads, of which each rank knows its own and has 0 elsewhere."""
        known = figures.to(self.ranks.device)
        every = self.ranks.gather(known, [known.shape[-1]] * self.ranks.size)
        return torch.stack(every).amax(dim=0).to(figures)

    # Weights

    def name(self, name: str) -> str:
        """A weight's name in a model that is not shared."""
        return name.replace(".own.", ".")

    def parts(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of whole weights that this rank has."""
        return {name: weight[self.plan.cut(name).place(self.ranks.rank)] for name, weight in weights.items()}

    def norm(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Of whole weights together, or of what goes with them; what several ranks have counts once."""
        square = torch.zeros(1, dtype=torch.float64, device=self.ranks.device)
        for name, part in parts.items():
            if self.ranks.rank in (owners(self.plan.cut(name).parts) or [0]):
                square += part.double().square().sum()
        return in_order(self.ranks.gather(square, [1] * self.ranks.size)).sqrt()[0]

    def whole_weights(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights, or what goes with them, on every rank. All must ask for the same names."""
        found = {}
        for name, part in parts.items():
            cut = self.plan.cut(name)
            axis = cut.axis or 0
            turned = part.movedim(axis, -1)
            found[name] = part if cut.axis is None else join(turned, self.ranks, cut.parts).movedim(-1, axis)
        return found
