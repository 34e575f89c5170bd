"""The results as an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllama.pages import render
from tinyllama.parity import charts
from tinyllama.parity.charts import Chart
from tinyllama.parity.tables import number

Figures = dict[str, Any]

# What a bool says, by its key: when true, when false.
WORDS = {
    "same_bits": ("same", "others"),
    "passed": ("passes", "fails"),
    "right": ("yes", "NO"),
    "harmless": ("yes", "no"),
    "near_tie": ("yes", "NO"),
}
# What None says, by its key, where it is no number that came out infinite or NaN.
NOTHING = {"same_bits": "", "address": "", "suspect": "", "theirs": "none"}
FORMATS: dict[str, Callable[[float], str]] = {
    "top1": "{:.2%}".format,
    "nll_change": "{:+.1e}".format,
    "got": "{:.9g}".format,
    "expected": "{:.9g}".format,
    "theirs": "{:.9g}".format,
}
# Large numbers of these are easier to read in groups of three digits; ids are no numbers.
COUNTS = ("positions", "ids", "calls", "weights")


def page(figures: Figures) -> str:
    """The page of `report.concluded` figures."""
    return render(
        __package__,
        figures,
        formatted,
        cases=[CaseView.of(figures, index) for index in range(len(figures["cases"]))],
        summary=summary(figures),
        worst_first=worst_first,
        machine=[(name, f"machine.{name}") for name in figures["machine"]],
        area=charts,
    )


@dataclass(frozen=True)
class RowView:
    """One implementation in one case.

    Attributes:
        key: where its figures are.
        row: its figures.
        times: its relRMS in R.
        flips: its flips, the one with the largest margin first, each with the key of its figures.
    """

    key: str
    row: Figures
    times: str
    flips: list[tuple[str, Figures]]

    @property
    def verdict(self) -> str:
        """In a word."""
        return "reference" if self.row["reference"] else "FAILED" if self.row["failures"] else "passed"


@dataclass(frozen=True)
class CaseView:
    """One model in one dtype.

    Attributes:
        key: where its figures are.
        case: its figures.
        rows: the implementations.
        times: the limit in R; empty where R has no part in it.
        layers: the error by layer.
        positions: the error by position, the longest text first.
    """

    key: str
    case: Figures
    rows: list[RowView]
    times: str
    layers: Chart | None
    positions: list[Chart]

    @staticmethod
    def of(figures: Figures, index: int) -> CaseView:
        """That of the figures' cases."""
        key, case = f"cases.{index}", figures["cases"][index]
        worst = charts.worst_reference(case)
        rows = [
            RowView(
                f"{key}.rows.{n}", row, times(row["relative"], worst), worst_first(f"{key}.rows.{n}", row)
            )
            for n, row in enumerate(case["rows"])
        ]
        limit = "" if charts.absolute_limit(case) else times(case["limits"]["relative"], worst)
        return CaseView(key, case, rows, limit, charts.layer_chart(case), charts.position_charts(case))

    @property
    def stages(self) -> list[str]:
        """What the errors by layer were measured at; empty where a row lacks one that was never computed."""
        counts = {len(row.row["by_layer"]) for row in self.rows}
        layers = max(counts, default=0) - 3
        if layers < 1 or len(counts) > 1:
            return []
        return ["embedding", *(f"layer {layer}" for layer in range(layers)), "norm", "logits"]

    @property
    def ours(self) -> list[RowView]:
        """The rows in question, the worst first."""
        return sorted((row for row in self.rows if not row.row["reference"]), key=_badness)

    @property
    def failed(self) -> bool:
        """Whether a row did."""
        return any(row.row["failures"] for row in self.rows)

    @property
    def bits(self) -> str:
        """Whether all that were compared bit by bit are the same; empty where none was."""
        known = {row.row["same_bits"] for row in self.rows} - {None}
        return WORDS["same_bits"][False in known] if known else ""

    @property
    def beyond(self) -> bool:
        """Whether the references themselves are over the limit, as transformers is in float64."""
        limit = self.case["limits"]["relative"]
        errors = [row.row["relative"] for row in self.rows if row.row["reference"]]
        return limit is not None and any(error is None or error > limit for error in errors)


def summary(figures: Figures) -> list[tuple[str, str]]:
    """What was judged, in a few numbers; what was not is left out."""
    cases, trials = figures["cases"], figures["mutations"]
    failed = sum(any(row["failures"] for row in case["rows"]) for case in cases)
    weights = sum(part["weights"] for part in figures["gradients"])
    same = sum(part["same_bits"] for part in figures["gradients"])
    ids = sum(part["ids"] for part in figures["continuations"])
    differ = sum(len(part["flips"]) for part in figures["continuations"])
    right = sum(trial["right"] for trial in trials)
    positions = sum(case["positions"] for case in cases)
    lines = [
        (len(cases), f"{len(cases) - failed:,} of {len(cases):,}", "models and dtypes passed"),
        (positions, f"{positions:,}", "positions, each with its whole row of logits"),
        (ids, f"{ids:,}", "ids beside transformers' generate, " + _differ(differ)),
        (weights, f"{same:,} of {weights:,}", "gradients of weights with the same bits"),
        (len(trials), f"{right:,} of {len(trials):,}", "planted bugs judged rightly"),
    ]
    return [(value, what) for count, value, what in lines if count]


def times(error: float | None, worst: float | None) -> str:
    """An error in R."""
    if error is None:
        return "not finite"
    return _multiple(error / worst) if worst else ""


def worst_first(key: str, part: Figures) -> list[tuple[str, Figures]]:
    """The part's flips with their keys, the largest margin first."""
    flips = [(f"{key}.flips.{index}", flip) for index, flip in enumerate(part["flips"])]
    return sorted(flips, key=lambda item: -_size(item[1]["margin"]))


def _differ(count: int) -> str:
    return (
        f"{count:,} {'continuation parts' if count == 1 else 'continuations part'}"
        if count
        else "all the same"
    )


def _badness(view: RowView) -> tuple[bool, float]:
    return not view.row["failures"], -_size(view.row["relative"])


def _size(value: float | None) -> float:
    return math.inf if value is None else value


def formatted(key: str, value: Any) -> str:
    """The one way in which the figure of that key is written."""
    *_, parent, name = ["", *key.split(".")]
    if value is None:
        return "none" if parent in ("limits", "machine") else NOTHING.get(name, "not finite")
    if isinstance(value, bool):
        return WORDS[name][not value]
    if name == "score":
        return _multiple(value)
    if isinstance(value, float):
        return FORMATS[name](value) if name in FORMATS else number(value, 2)
    if isinstance(value, int):
        return f"{value:,}" if name in COUNTS else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "greedy"
    return value if isinstance(value, str) else json.dumps(value)


def _multiple(value: float) -> str:
    """So many R: from the limit's 1.5 to a bug's million."""
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:#.3g}"
