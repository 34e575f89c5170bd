"""A report as an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from tinyllama.pages import render
from tinyllama.parity import charts
from tinyllama.parity.continuations import IdFlip
from tinyllama.parity.report import Case, Flip, Report, Row
from tinyllama.parity.tables import number

# What a bool says, by its key: when true, when false.
WORDS = {
    "same_bits": ("same", "differ"),
    "passed": ("passes", "fails"),
    "right": ("yes", "NO"),
    "harmless": ("yes", "no"),
    "near_tie": ("yes", "NO"),
}
# What NaN and infinity say, by their key, where they are no failure of a computation.
NOT_FINITE = {"theirs": "none", "reference": "none", "nll_change": "none"}
FORMATS: dict[str, Callable[[float], str]] = {
    "top1": "{:.2%}".format,
    "nll_change": "{:+.1e}".format,
    "got": "{:.9g}".format,
    "expected": "{:.9g}".format,
    "theirs": "{:.9g}".format,
}
# Large numbers of these are written in groups of three digits; ids are not.
COUNTS = ("positions", "ids", "calls", "weights")


def page(report: Report) -> str:
    """The page of a report."""
    return render(
        __package__,
        report,
        formatted,
        summary=summary(report),
        machine=[(name, f"machine.{name}") for name in report.machine],
        charts=charts,
        multiple=multiple,
        stages=stages,
        whose=lambda case: [f"#{row.who}" for row in case.rows],
        worst_row=worst_row,
        worst_first=worst_first,
        bits=bits,
        beyond=beyond,
    )


def summary(report: Report) -> list[tuple[str, str]]:
    """What was judged, in a few numbers; what was not is left out."""
    cases, trials = report.cases, report.mutations
    passed = sum(not case.failures for case in cases)
    positions = sum(case.positions for case in cases)
    ids = sum(part.ids for part in report.continuations)
    flips = sum(len(part.flips) for part in report.continuations)
    differ = f"differences: {flips:,}" if flips else "all the same"
    weights = sum(part.weights for part in report.gradients)
    same = sum(part.same_bits for part in report.gradients)
    right = sum(trial.right for trial in trials)
    lines = [
        (len(cases), f"{passed:,} of {len(cases):,}", "models and dtypes passed"),
        (positions, f"{positions:,}", "positions, each with its whole row of logits"),
        (ids, f"{ids:,}", f"ids beside transformers' generate, {differ}"),
        (weights, f"{same:,} of {weights:,}", "gradients of weights with the same bits"),
        (len(trials), f"{right:,} of {len(trials):,}", "planted bugs judged rightly"),
    ]
    return [(value, what) for count, value, what in lines if count]


def worst_row(case: Case) -> int | None:
    """The number of the row in question with the largest error, one that fails before all others."""
    ours = [index for index, row in enumerate(case.rows) if not row.reference]

    def badness(index: int) -> tuple[bool, float]:
        row = case.rows[index]
        return bool(row.failures), row.relative if math.isfinite(row.relative) else math.inf

    return max(ours, key=badness, default=None)


def worst_first(flips: Sequence[Flip | IdFlip]) -> list[int]:
    """The numbers of the flips, the largest margin first."""
    margins = [flip.margin if math.isfinite(flip.margin) else math.inf for flip in flips]
    return sorted(range(len(flips)), key=lambda index: -margins[index])


def bits(case: Case) -> str:
    """Whether all rows that were compared bit by bit are the same; empty where none was."""
    known = {row.same_bits for row in case.rows} - {None}
    return WORDS["same_bits"][False in known] if known else ""


def beyond(case: Case) -> bool:
    """Whether the references themselves are over the limit, as transformers is in float64."""
    return any(row.reference and not row.relative <= case.limits.relative for row in case.rows)


def stages(rows: Sequence[Row]) -> list[str]:
    """Where the errors by layer were measured; empty where the rows differ in that."""
    counts = {len(row.by_layer) for row in rows}
    layers = max(counts, default=0) - 3
    if layers < 1 or len(counts) > 1:
        return []
    return ["embedding", *(f"layer {layer}" for layer in range(layers)), "norm", "logits"]


def formatted(key: str, value: Any) -> str:
    """How the page writes the value of that key."""
    *_, parent, name = ["", *key.split(".")]
    if value is None:
        return "none" if parent == "machine" else ""
    if isinstance(value, bool):
        return WORDS[name][not value]
    if isinstance(value, float) and not math.isfinite(value):
        return "none" if parent == "limits" else NOT_FINITE.get(name, "not finite")
    if name == "score":
        return multiple(value)
    if isinstance(value, float):
        return FORMATS[name](value) if name in FORMATS else number(value, 2)
    if isinstance(value, int):
        return f"{value:,}" if name in COUNTS else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "greedy"
    return value if isinstance(value, str) else json.dumps(value)


def multiple(value: float | None) -> str:
    """A number of R: from the limit's 1.5 to a bug's million."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:#.3g}"
