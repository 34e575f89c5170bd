"""The scorecard as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tinyllama.lab.clauses import CLAUSES
from tinyllama.lab.continuation import Continuation
from tinyllama.lab.figures import Results, Scorecard
from tinyllama.lab.perplexity import BLOCK, FEWEST_BLOCKS
from tinyllama.lab.tables import change, grouped, percent, shortened, times
from tinyllama.pages import render
from tinyllama.pages.chart import rounded_up
from tinyllama.ranges import ranges

# Colours from a change of 0, which has its own, to the top of a map's scale.
STEPS = 10
# How None is written, by the figure's name.
NOTHING = {
    "decode": "no cache",
    "decode_ratio": "no cache",
    "needed": "not known",
    "parts_at": "the same",
    "example": "",
}
FORMATS: dict[str, Callable[[Any], str]] = {
    "before": grouped,
    "after": grouped,
    "ratio": percent,
    "low": percent,
    "high": percent,
    "top1": "{:.1%}".format,
    "needed": "{:.0%}".format,
    "kept": "{:.0%}".format,
    "share": "{:.0%}".format,
    "bytes": lambda count: f"{count / 1e6:,.2f} MB",
    "prefill": "{:,.1f}".format,
    "decode": "{:,.1f}".format,
    "prefill_ratio": times,
    "decode_ratio": times,
    "prompt": shortened,
}
SETTINGS = [
    ("layers", "model.layers"),
    ("query heads", "model.heads"),
    ("KV heads", "model.kv_heads"),
    ("dtype", "model.dtype"),
    ("the model's own attention", "model.kernels"),
    ("texts, in tokens", "texts"),
    ("context for speed, in tokens", "extent.context"),
    ("rounds of timing", "extent.rounds"),
    ("new tokens of a continuation", "extent.new_tokens"),
]


def page(card: Scorecard) -> str:
    """The page of a scorecard; its template finds a figure by its key in `asdict` of it."""
    measured = [n for n, one in enumerate(card.changes) if one.passed]
    return render(
        __package__,
        asdict(card),
        formatted,
        card=card,
        changes=list(enumerate(card.changes)),
        measured=measured,
        speeds=["unchanged", *(f"changes.{n}.results" for n in measured)],
        clauses=len(CLAUSES),
        heads=[f"#{head}" for head in range(card.model.heads)],
        block=BLOCK,
        fewest=FEWEST_BLOCKS,
        steps=STEPS,
        finding=finding,
        scale=scale,
        step=step,
        moved=moved,
        rounded=lambda value: f"{100 * value:,.2f}".rstrip("0").rstrip(".") + "%",
        largest=largest,
        token_at=token_at,
        settings=SETTINGS,
        machine=[(name, f"machine.{name}") for name in card.machine],
    )


def finding(results: Results) -> str:
    """What a change does to the prediction of text, in words."""
    whole = results.all
    if whole.low is not None and whole.high is not None and whole.low <= 1 <= whole.high:
        return f"perplexity as before, as far as these texts tell ({change(whole)})"
    if whole.ratio < 1:
        return f"lower perplexity, {change(whole)}"
    size = (
        "perplexity doubled"
        if 1.9 <= whole.ratio < 2.1
        else f"perplexity {grouped(whole.ratio, 2)} times as high"
    )
    return f"{size if whole.ratio >= 1.9 else 'higher perplexity'}, {change(whole)}"


def scale(values: Sequence[Sequence[float]]) -> float:
    """The top of a scale: the largest finite value, rounded up to 1, 2 or 5 times a power of ten."""
    most = max((value for row in values for value in row if math.isfinite(value)), default=0.0)
    return rounded_up(most) if most > 0 else 1.0


def step(value: float, top: float) -> str:
    """The class of a value's colour: s0 for no change at all, s1 to s10 up to the top of the scale.

    By the square root: one head that moves tenfold must not leave all others alike.
    """
    return f"s{math.ceil(min(value / top, 1.0) ** 0.5 * STEPS)}" if math.isfinite(value) else "unknown"


def moved(value: float) -> str:
    """A relative change in percent; a very small one differs from none."""
    if not math.isfinite(value):
        return "not finite"
    if value < 0.001:
        return "<0.1%" if value else "0%"
    return f"{value:.1%}" if value < 100 else f"{100 * value:.1e}%"


def largest(values: Sequence[Sequence[float]]) -> str:
    """The largest of (L, H) relative changes and where it is; empty if nothing moved."""
    places = {(n, h): value for n, row in enumerate(values) for h, value in enumerate(row)}
    finite = {place: value for place, value in places.items() if math.isfinite(value)}
    layer, head = max(finite, key=lambda place: finite[place], default=(0, 0))
    value = finite.get((layer, head))
    return f"{moved(value)} in layer {layer}, head {head}" if value else ""


def token_at(one: Continuation, place: int) -> str:
    """The id at a place of a continuation, or that it ends there."""
    return f"id {one.ids[place]}" if place < len(one.ids) else "the end"


def formatted(key: str, value: Any) -> str:
    """How the figure of that key is written, everywhere on the page."""
    name = key.split(".")[-1]
    if value is None:
        return NOTHING.get(name, "none")
    if name in FORMATS:
        return FORMATS[name](value)
    if name in ("layers", "heads") and isinstance(value, list):
        return ranges(value).replace(",", ", ")
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return divergence(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def divergence(value: float) -> str:
    """Nats, in comparable digits: 2.440, 0.041, 3.1e-05."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"
