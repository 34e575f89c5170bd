"""Results as one plain dictionary: what `--json` writes, and all that tables and pages are made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tinyllama.parity.comparison import Case, Row
from tinyllama.parity.continuations import Continuations
from tinyllama.parity.divergence import Divergence
from tinyllama.parity.gradients import WeightGradient
from tinyllama.parity.measure import Difference
from tinyllama.parity.mutations import Trial

# Positions that share one point of a curve.
BIN = 32

Figures = dict[str, Any]

# Lists of figures: logits of a model in a dtype, generated ids, gradients, the notebook's texts, planted
# bugs, and searches for the first divergence.
SECTIONS = ("cases", "continuations", "gradients", "notebook", "mutations", "searches")


def case_figures(model: str, dtype: str, case: Case, note: str = "") -> Figures:
    """One model in one dtype; JSON has no NaN and no infinity, so both become None.

    `note` says what was not judged, and why.
    """
    return {
        "model": model,
        "dtype": dtype,
        "positions": sum(case.positions.values()),
        "texts": case.positions,
        "bin": BIN,
        "note": note,
        "limits": {
            "relative": _number(case.limits.relative),
            "kl_mean": _number(case.limits.kl_mean),
            "kl_max": _number(case.limits.kl_max),
            "flip_margin": _number(case.limits.flip_margin),
            "top1": case.limits.top1 or None,
            "nll_change": _number(case.limits.nll_change),
        },
        "rows": [_row(row, case) for row in case.rows],
    }


def _row(row: Row, case: Case) -> Figures:
    measured = row.measured
    return {
        "who": row.who,
        "reference": row.reference,
        "relative": _number(measured.relative),
        "rms": _number(measured.rms),
        "mean": _number(measured.mean),
        "max": _number(measured.max),
        "kl_mean": _number(measured.kl_mean),
        "kl_p99": _number(measured.kl_p99),
        "kl_max": _number(measured.kl_max),
        "top1": _number(measured.top1),
        "nll_change": _number(measured.nll_change),
        "flips": _flips(measured, case.positions),
        "same_bits": row.same_bits,
        "by_layer": [_number(error) for error in row.by_layer],
        "by_position": _curves(measured, case.positions),
        "failures": list(row.failures),
    }


def _starts(positions: Mapping[str, int]) -> Iterable[tuple[str, int, int]]:
    """Each text with its range of positions in the whole."""
    start = 0
    for text, count in positions.items():
        yield text, start, start + count
        start += count


def _flips(measured: Difference, positions: Mapping[str, int]) -> list[Figures]:
    return [
        {
            "text": text,
            "position": index - start,
            "expected": measured.expected[index].item(),
            "chosen": measured.chosen[index].item(),
            "margin": _number(measured.margin[index].item()),
        }
        for text, start, end in _starts(positions)
        for index in range(start, end)
        if measured.flipped[index]
    ]


def _curves(measured: Difference, positions: Mapping[str, int]) -> dict[str, list[float | None]]:
    """The relRMS of each group of BIN positions, text by text."""

    def curve(squared: Tensor, truth: Tensor) -> list[float | None]:
        groups = zip(squared.split(BIN), truth.split(BIN), strict=True)
        return [_number((error.mean() / size.mean()).sqrt().item()) for error, size in groups]

    return {
        text: curve(measured.squared[start:end], measured.truth_squared[start:end])
        for text, start, end in _starts(positions)
    }


def continuation_figures(model: str, dtype: str, what: str, rows: list[Continuations]) -> Figures:
    """Several calls of `generate` that are told together."""
    return {
        "model": model,
        "dtype": dtype,
        "what": what,
        "calls": len(rows),
        "ids": sum(row.ids for row in rows),
        "flips": [
            {
                "settings": row.settings,
                "prompt": flip.row,
                "step": flip.step,
                "expected": flip.theirs,
                "chosen": flip.ours,
                "margin": _number(flip.margin),
                "limit": _number(flip.limit),
                "near_tie": flip.near_tie,
            }
            for row in rows
            for flip in row.flips
        ],
        "failures": [failure for row in rows for failure in row.failures],
    }


def gradient_figures(model: str, dtype: str, positions: int, rows: list[WeightGradient]) -> Figures:
    """Every weight's gradient, in one line: the weight that is nearest to its limit."""
    worst = max(rows, key=lambda row: row.error / row.limit if row.limit else math.inf)
    return {
        "model": model,
        "dtype": dtype,
        "positions": positions,
        "weights": len(rows),
        "same_bits": sum(row.same_bits for row in rows),
        "worst": {
            "weight": worst.weight,
            "relative": _number(worst.error),
            "reference": _number(worst.reference),
            "limit": _number(worst.limit),
        },
        "failures": [
            f"gradient of {row.weight}: relRMS {row.error:.2e} is over 2 R = {row.limit:.2e}"
            for row in rows
            if not row.passed
        ],
    }


def trial_figures(trial: Trial) -> Figures:
    """One mutation: what the gate and the search made of it."""
    mutation, found = trial.mutation, trial.found
    return {
        "name": mutation.name,
        "harmless": mutation.address is None,
        "score": _number(trial.score),
        "passed": trial.passed,
        "address": found and found.address,
        "suspect": found and found.suspect,
        "right": trial.right,
    }


def divergence_figures(model: str, dtype: str, who: str, text: str, found: Divergence | None) -> Figures:
    """What a search found in one implementation."""
    place = None
    if found is not None:
        place = {
            "address": found.address,
            "relative": _number(found.error),
            "reference": _number(found.reference),
            "limit": _number(found.limit),
            "shape": list(found.shape),
            "place": list(found.place),
            "got": _number(found.got),
            "expected": _number(found.expected),
            "theirs": _number(found.theirs),
            "suspect": found.suspect,
            "path": [
                {
                    "address": step.address,
                    "relative": _number(step.error),
                    "reference": _number(step.reference),
                    "limit": _number(step.limit),
                }
                for step in found.path
            ],
        }
    return {"model": model, "dtype": dtype, "who": who, "text": text, "found": place}


def concluded(figures: Figures) -> Figures:
    """The figures with the verdict: `passed`, and every failure in one line."""
    lines = _failures(figures)
    return {"passed": not lines, "failures": lines, **figures}


def _failures(figures: Figures) -> list[str]:
    lines = []
    for case in figures["cases"]:
        for row in case["rows"]:
            lines += [
                f"{case['model']} {case['dtype']}: {row['who']}: {failure}" for failure in row["failures"]
            ]
    for section in ("continuations", "gradients", "notebook"):
        for part in figures[section]:
            lines += [f"{part['model']} {part['dtype']}: {failure}" for failure in part["failures"]]
    lines += [
        f"mutation {trial['name']}: judged wrongly" for trial in figures["mutations"] if not trial["right"]
    ]
    return lines


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
