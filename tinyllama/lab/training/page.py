"""An experiment as an HTML page: which attention learns better, and how the loss went down."""

from __future__ import annotations

import math
import statistics
from typing import Any

from tinyllama.lab.training.experiment import Experiment
from tinyllama.lab.training.findings import Finding
from tinyllama.pages import render
from tinyllama.pages.chart import (
    BOTTOM,
    COLOURS,
    MOST_TICKS,
    TOP,
    Chart,
    Curve,
    Tick,
    across,
    rounded_up,
    tick_step,
)

FORMATS = {
    "loss": "{:.3f}",
    "worse": "{:+.1%}",
    "margin": "± {:.1%}",
    "faster": "{:+.0%}",
    "tokens_per_second": "{:,.0f}",
    "peer": "{:,.0f}",
    "lr": "{:g}",
    "decay": "{:g}",
}
SETTINGS = {
    "steps": "steps",
    "batch": "windows a step",
    "length": "tokens a window",
    "lr": "largest learning rate",
    "warm_up": "steps of warm-up",
    "decay": "weight decay of matrices",
    "accumulate": "parts of a step",
    "autocast": "dtype",
    "compiled": "compiled",
    "text": "digest of the text",
}


def page(experiment: Experiment) -> str:
    """The page of an experiment."""
    return render(
        __package__,
        experiment,
        formatted,
        chart=loss_chart(experiment),
        interval=Interval(experiment.findings),
        better=lambda one: one.margin is not None and one.worse < -one.margin,
        worse=lambda one: one.margin is not None and one.worse > one.margin,
        settings=[(text, f"recipe.{name}") for name, text in SETTINGS.items()],
        shape=[(name, f"model.{name}") for name in experiment.model],
        machine=[(name, f"machine.{name}") for name in experiment.machine],
    )


def formatted(key: str, value: Any) -> str:
    """How the figure of that key is written."""
    name = key.split(".")[-1]
    if name == "autocast":
        return value or "float32"
    if value is None:
        return "one seed" if name == "margin" else "none"
    if name == "saved_bytes":
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in FORMATS:
        return FORMATS[name].format(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def loss_chart(experiment: Experiment) -> Chart:
    """The held-out loss over the tokens read: each mean, and in grey from the best seed to the worst."""
    recipe = experiment.recipe
    looks = [steps * recipe.batch * recipe.length for steps, _ in experiment.runs[0].held_out]
    losses = {
        kernel: list(zip(*([loss for _, loss in run.held_out] for run in experiment.of(kernel)), strict=True))
        for kernel in experiment.kernels
    }
    finite = [loss for looked in losses.values() for seeds in looked for loss in seeds if math.isfinite(loss)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    step = rounded_up((high - low) / (MOST_TICKS - 2) or 0.1)
    first, last = math.floor(low / step), math.ceil(high / step)
    last += last == first

    def y(loss: float) -> float:
        return round(BOTTOM - (loss / step - first) / (last - first) * (BOTTOM - TOP), 2)

    def x(tokens: int) -> float:
        return across(tokens / recipe.tokens)

    def points(values: list[float]) -> tuple[str, ...]:
        drawn = [f"{x(at)},{y(loss)}" for at, loss in zip(looks, values, strict=True) if math.isfinite(loss)]
        return (" ".join(drawn),) if len(drawn) > 1 else ()

    def outline(looked: list[tuple[float, ...]]) -> list[str]:
        if len(looked[0]) == 1 or not all(map(math.isfinite, (loss for seeds in looked for loss in seeds))):
            return []
        there = [f"{x(at)},{y(min(seeds))}" for at, seeds in zip(looks, looked, strict=True)]
        back = [f"{x(at)},{y(max(seeds))}" for at, seeds in zip(looks, looked, strict=True)][::-1]
        return [" ".join(there + back)]

    band = [area for looked in losses.values() for area in outline(looked)]
    return Chart(
        title="Loss of held-out text",
        measure="nats a token",
        axis="tokens read",
        ends=("", ""),
        xs=tuple(
            Tick(x(at), f"{at:,}") for at in range(0, recipe.tokens + 1, tick_step(recipe.tokens // 2) * 2)
        ),
        ys=tuple(Tick(y(n * step), f"{n * step:.3g}") for n in range(first, last + 1)),
        band=tuple(band),
        band_name="from the best to the worst seed" if band else "",
        curves=tuple(
            Curve(kernel, f"series-{n % COLOURS}", points(list(map(statistics.mean, looked))))
            for n, (kernel, looked) in enumerate(losses.items())
        ),
        notes=(),
    )


class Interval:
    """Where the differences from the first attention stand on one scale, in percent of a drawing's width."""

    def __init__(self, findings: list[Finding]) -> None:
        ends = [one.worse + sign * (one.margin or 0.0) for one in findings for sign in (-1, 1)]
        finite = [end for end in ends if math.isfinite(end)]
        low, high = min([0.0, *finite]), max([0.0, *finite])
        room = (high - low) * 0.05 or 0.01
        self.low, self.high = low - room, high + room

    def at(self, worse: float) -> float:
        """Where a difference stands."""
        return round(100 * (worse - self.low) / (self.high - self.low), 2)
