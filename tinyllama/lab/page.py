"""The scorecard as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllama.lab.clauses import CLAUSES
from tinyllama.lab.maps import LEFT, STEPS, TOP, Drawing, head_map, layer_bars, moved
from tinyllama.lab.perplexity import BLOCK, FEWEST_BLOCKS
from tinyllama.lab.tables import grouped, percent, ranges, shortened, times
from tinyllama.pages import render

Figures = dict[str, Any]

# What None says, by its key.
NOTHING = {
    "decode": "no cache",
    "decode_ratio": "no cache",
    "needed": "no gradient",
    "parts_at": "the same",
    "example": "",
    "gpu": "none",
}
FORMATS: dict[str, Callable[[Any], str]] = {
    "before": grouped,
    "after": grouped,
    "ratio": percent,
    "low": percent,
    "high": percent,
    "top1": "{:.1%}".format,
    "needed": "{:.0%}".format,
    "prefill": "{:,.1f}".format,
    "decode": "{:,.1f}".format,
    "prefill_ratio": times,
    "decode_ratio": times,
    "prompt": shortened,
}


def page(figures: Figures) -> str:
    """The page of a `scorecard`."""
    cards = [CardView.of(figures, index) for index in range(len(figures["changes"]))]
    kernels = ", ".join(figures["model"]["kernels"])
    return render(
        __package__,
        figures,
        formatted,
        cards=cards,
        measured=[view for view in cards if view.card["passed"]],
        broken=[view for view in cards if not view.card["passed"]],
        tried=tried(figures),
        timed="speed" in figures["unchanged"],
        speeds=["unchanged", *(view.key for view in cards if view.card["passed"])],
        kernels=kernels,
        clauses=len(CLAUSES),
        block=BLOCK,
        fewest=FEWEST_BLOCKS,
        moved=moved,
        heads=[f"#{head}" for head in range(figures["model"]["heads"])],
        steps=STEPS,
        left=LEFT,
        top=TOP,
        settings=[
            ("layers", "model.layers"),
            ("query heads", "model.heads"),
            ("KV heads", "model.kv_heads"),
            ("dtype", "model.dtype"),
            ("the model's own attention", "model.kernels"),
            ("texts, in tokens", "texts"),
            ("context for speed, in tokens", "extent.context"),
            ("rounds of timing", "extent.rounds"),
            ("new tokens of a continuation", "extent.new_tokens"),
        ],
        machine=[(name, f"machine.{name}") for name in figures["machine"]],
    )


@dataclass(frozen=True)
class Pair:
    """A prompt's continuation by the changed model, beside the unchanged one.

    Attributes:
        key: where the changed one's figures are.
        own_key: where the unchanged one's are.
        mine: the changed one.
        own: the unchanged one.
    """

    key: str
    own_key: str
    mine: Figures
    own: Figures

    @property
    def before(self) -> tuple[str, str]:
        """The unchanged text, up to where they part and from there."""
        same, whole = self.mine["same"], self.own["same"]
        return (same, whole[len(same) :]) if whole.startswith(same) else ("", whole)

    @property
    def tokens(self) -> tuple[str, str]:
        """Where they part, unchanged and changed: the id, or that it ends there."""
        at = self.mine["parts_at"]
        one, other = (
            f"id {ids[at]}" if at < len(ids) else "the end" for ids in (self.own["ids"], self.mine["ids"])
        )
        return one, other


@dataclass(frozen=True)
class CardView:
    """One change.

    Attributes:
        index: its place.
        key: where its figures are.
        card: its figures.
        maps: what moved by head: by itself, and in the end; empty for one that was not measured.
        bars: what moved by layer.
        pairs: its continuations.
    """

    index: int
    key: str
    card: Figures
    maps: tuple[Drawing, ...]
    bars: Drawing | None
    pairs: list[Pair]

    @staticmethod
    def of(figures: Figures, index: int) -> CardView:
        """That of the figures' changes."""
        key, card = f"changes.{index}", figures["changes"][index]
        if not card["passed"]:
            return CardView(index, key, card, (), None, [])
        layers, heads = set(card["layers"]), set(card["heads"])
        maps = (
            head_map("By itself", "heads_direct", card["heads_direct"], layers, heads),
            head_map("In the end", "heads_changed", card["heads_changed"], layers, heads),
        )
        bars = layer_bars("Residual stream", "layers_changed", card["layers_changed"], layers)
        own = figures["unchanged"]["continuations"]
        pairs = [
            Pair(f"{key}.continuations.{n}", f"unchanged.continuations.{n}", mine, own[n])
            for n, mine in enumerate(card["continuations"])
        ]
        return CardView(index, key, card, maps, bars, pairs)

    @property
    def rows(self) -> list[tuple[str, Figures]]:
        """How each text is predicted, and all together where there are several, each with its key."""
        texts = self.card["texts"]
        rows = [(f"{self.key}.texts.{n}", row) for n, row in enumerate(texts)]
        return rows if len(texts) == 1 else [*rows, (f"{self.key}.all", self.card["all"])]

    def clauses(self, verdict: str) -> list[tuple[str, Figures]]:
        """Those of the contract with that verdict, each with its key."""
        parts = enumerate(self.card["contract"])
        return [(f"{self.key}.contract.{n}", part) for n, part in parts if part["verdict"] == verdict]

    @property
    def parted(self) -> list[Pair]:
        """The continuations that are not the same, the one that parts first in front."""
        return sorted(
            (pair for pair in self.pairs if pair.mine["parts_at"] is not None),
            key=lambda pair: pair.mine["parts_at"],
        )


def tried(figures: Figures) -> list[tuple[list[str], str]]:
    """The changes' names, together where they went to the same layers and heads, and where that is."""
    groups: dict[str, list[str]] = {}
    for card in figures["changes"]:
        where = f"{_some('layer', card['layers'], figures['model']['layers'])}, "
        where += _some("head", card["heads"], figures["model"]["heads"])
        groups.setdefault(where, []).append(card["name"])
    return [(names, where) for where, names in groups.items()]


def _some(what: str, numbers: list[int], count: int) -> str:
    """All 9 heads, head 3, heads 0-2, 7."""
    if len(numbers) == count:
        return f"all {count} {what}s"
    return f"{what}{'' if len(numbers) == 1 else 's'} {_spaced(numbers)}"


def _spaced(numbers: list[int]) -> str:
    return ranges(numbers).replace(",", ", ")


def formatted(key: str, value: Any) -> str:
    """The one way in which the figure of that key is written."""
    name = key.split(".")[-1]
    if value is None:
        return NOTHING.get(name, "none")
    if name in FORMATS:
        return FORMATS[name](value)
    if name in ("layers", "heads") and isinstance(value, list):
        return _spaced(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return divergence(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def divergence(value: float) -> str:
    """Nats, in digits that can be compared: 2.440, 0.041, 3.1e-05."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"
