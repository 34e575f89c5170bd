"""Figures round by round: every subject in turn, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

Taken = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Figure:
    """What is timed.

    Attributes:
        kind: "decode", "prefill" or "batch".
        size: tokens of context before the decode steps, tokens of the prefill, or rows of the batch.
        steps: how many are timed; a prefill has none.
        always: in every round; otherwise in the first ones only, for a chart.
        beside: what is timed just before, of the same subject, for a ratio in which memory, whose speed may
            change from minute to minute, has no part.
    """

    kind: str
    size: int
    steps: int = 0
    always: bool = True
    beside: Figure | None = None

    @property
    def key(self) -> str:
        """`decode@16`."""
        return f"{self.kind}@{self.size}"

    @property
    def tokens(self) -> int:
        """How many tokens the measured seconds stand for: a step's, or the whole prefill's."""
        return 1 if self.kind == "decode" else self.size

    @property
    def context(self) -> int:
        """Cached tokens that a step reads, on average; a prefill reads none."""
        return {"decode": self.size + self.steps // 2, "batch": self.steps // 2}.get(self.kind, 0)


class Subject(Protocol):
    """Something that runs the model."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    def seconds(self, figure: Figure) -> float | None:
        """Of a step, or of the prefill; None where it cannot do that."""

    def bytes_read(self, rows: int, context: int) -> int:
        """What a step of that many rows must read: weights, and the cached keys and values of each row."""


@dataclass(frozen=True)
class Rounds:
    """What the rounds gave, without the first, which warms up.

    Attributes:
        seconds: by subject and figure, one for each round.
        ratios: likewise, of the speed to that of the figure beside it, where there is one.
        bandwidth: bytes a second just before each figure of each round.
        peaks: FLOP/s of a large product by dtype, once a round.
    """

    seconds: Taken
    ratios: Taken
    bandwidth: dict[str, list[float]]
    peaks: dict[str, list[float]]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """That of one value or more."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return Spread(median(values), low, high)


def interleave(
    subjects: Sequence[Subject],
    figures: Sequence[Figure],
    rounds: int,
    chart_rounds: int,
    bandwidth: Callable[[], float],
    peaks: Mapping[str, Callable[[], float]],
    step: Callable[[str], None] = lambda what: None,
) -> Rounds:
    """Measure every figure of every subject, in turn, in each round.

    Args:
        subjects: what is measured.
        figures: what is timed of each.
        rounds: how many count; one more comes first.
        chart_rounds: in how many of them the figures that are not `always` take part.
        bandwidth: measures it.
        peaks: measure those of the dtypes.
        step: told after each figure of each round.
    """
    seconds: Taken = {subject.name: {} for subject in subjects}
    ratios: Taken = {subject.name: {} for subject in subjects}
    read: dict[str, list[float]] = {}
    products: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        counts = turn > 0  # the first round warms up
        for dtype, peak in peaks.items():
            products.setdefault(dtype, []).extend([peak()][: int(counts)])
        for figure in figures:
            if not figure.always and turn > chart_rounds:
                continue
            read.setdefault(figure.key, []).extend([bandwidth()][: int(counts)])
            for subject in subjects:
                before = subject.seconds(figure.beside) if figure.beside else None
                taken = subject.seconds(figure)
                if counts and taken is not None:
                    seconds[subject.name].setdefault(figure.key, []).append(taken)
                    if figure.beside and before is not None:
                        ratio = (figure.tokens / taken) / (figure.beside.tokens / before)
                        ratios[subject.name].setdefault(figure.key, []).append(ratio)
            step(
                f"round {turn} of {rounds}, {figure.kind} {figure.size}" if turn else f"warm-up, {figure.key}"
            )
    return Rounds(seconds, ratios, read, products)


def steps_of(figures: Sequence[Figure], rounds: int, chart_rounds: int) -> int:
    """How often `interleave` will call `step`."""
    return sum(1 + (rounds if figure.always else min(rounds, chart_rounds)) for figure in figures)
