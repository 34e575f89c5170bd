"""Charts of errors as points to be drawn: over the layers, and over the positions of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tinyllama.pages.chart import BOTTOM, COLOURS, MOST_TICKS, TOP, Chart, Curve, Tick, across, tick_step
from tinyllama.parity.report import BIN, Case

Values = Sequence[float]

# A line this short shows its points, too.
FEW = 12
ZERO_NOTE = "An error of zero has no place on a log axis."
BREAK_NOTE = "A line breaks off where an error is not finite."


def layer_chart(case: Case) -> Chart | None:
    """The error at each stage, from the embedding to the logits; None where there is nothing to draw."""
    curves = {row.who: row.by_layer for row in case.rows}
    count = max(map(len, curves.values()), default=0)
    if count < 4:
        return None
    layers = count - 3
    xs = [index / (count - 1) for index in range(count)]
    ticks = [Tick(across(xs[layer + 1]), str(layer)) for layer in range(0, layers, tick_step(layers))]
    return _chart("Error by layer", "layer", ("embedding", "norm, logits"), case, curves, xs, ticks)


def position_charts(case: Case) -> list[Chart]:
    """The error over the positions of each text, the longest text first."""
    charts = []
    for text, length in sorted(case.texts.items(), key=lambda item: -item[1]):
        curves = {row.who: row.by_position.get(text, []) for row in case.rows}
        xs = [(start + min(start + BIN, length)) / 2 / length for start in range(0, length, BIN)]
        ticks = [Tick(across(at / length), str(at)) for at in range(0, length + 1, tick_step(length))]
        charts.append(_chart(f"Error by position: {text}", "position", ("", ""), case, curves, xs, ticks))
    return [chart for chart in charts if chart]


def _chart(
    title: str,
    axis: str,
    ends: tuple[str, str],
    case: Case,
    curves: Mapping[str, Values],
    xs: Sequence[float],
    ticks: list[Tick],
) -> Chart | None:
    # A curve of another length lacks a stage that was never computed: its points would stand elsewhere.
    rows = [row for row in case.rows if len(curves[row.who]) == len(xs)]
    theirs = [curves[row.who] for row in rows if row.reference]
    ours = {row.who: curves[row.who] for row in rows if not row.reference}
    # NaN where one of the references has no value.
    lower, upper = (
        [math.nan if any(map(math.isnan, values)) else pick(values) for values in zip(*theirs, strict=True)]
        for pick in (min, max)
    )
    name, limit = _limit(case, upper, len(xs))
    drawn = [value for curve in [*theirs, *ours.values()] for value in curve]
    if not any(map(_drawable, drawn)):
        return None
    shown = [value for value in [*drawn, *limit] if _drawable(value)]
    scale = _log_ticks(min(shown), max(shown))
    low, high = math.log10(scale[0]), math.log10(scale[-1])

    def y(value: float) -> float:
        return round(BOTTOM - (math.log10(value) - low) / (high - low) * (BOTTOM - TOP), 2)

    def points(part: Sequence[int], values: Values, shift: int = 0) -> str:
        return " ".join(f"{across(xs[index]) + shift},{y(values[index])}" for index in part)

    def curve(name: str, style: str, values: Values) -> Curve:
        parts = _parts(values)
        all_dots = style != "limit" and len(values) <= FEW
        dots = [index for part in parts for index in part if len(part) == 1 or all_dots]
        lines = tuple(points(part, values) for part in parts if len(part) > 1)
        return Curve(name, style, lines, tuple((across(xs[index]), y(values[index])) for index in dots))

    def area(part: Sequence[int]) -> str:
        corners = [(part, lower, 0), (part[::-1], upper, 0)]
        if len(part) == 1:  # a little width, to be seen
            corners = [(part, lower, -8), (part, lower, 8), (part, upper, 8), (part, upper, -8)]
        return " ".join(points(*corner) for corner in corners)

    curves_drawn = [curve(name, "limit", limit)] if any(map(_drawable, limit)) else []
    curves_drawn += [curve(who, f"series-{n % COLOURS}", one) for n, (who, one) in enumerate(ours.items())]
    notes = [ZERO_NOTE] if 0.0 in drawn else []
    notes += [] if all(map(math.isfinite, drawn)) else [BREAK_NOTE]
    return Chart(
        title=title,
        measure="relRMS (log)",
        axis=axis,
        ends=ends,
        xs=tuple(ticks),
        ys=tuple(Tick(y(value), _power(value)) for value in scale),
        band=tuple(map(area, _parts(lower, upper))),
        band_name="the references" if any(map(_drawable, upper)) else "",
        curves=tuple(curves_drawn),
        notes=tuple(notes),
    )


def _limit(case: Case, upper: Values, count: int) -> tuple[str, Values]:
    """The limit's name, and the limit at each place: as many times the references' error as at the logits."""
    limit, times = case.limits.relative, case.limit_times()
    if not math.isfinite(limit):
        return "", []
    if times is None:
        return f"limit {_power(limit)}", [limit] * count
    return f"limit: {times:.3g} R", [times * value for value in upper]


def _drawable(value: float) -> bool:
    return 0 < value < math.inf


def _parts(*curves: Values) -> list[list[int]]:
    """Runs of places at which every curve can be drawn on a log axis."""
    parts: list[list[int]] = [[]]
    for index, values in enumerate(zip(*curves, strict=True)):
        if all(map(_drawable, values)):
            parts[-1].append(index)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from one at or under `low` to one at or over `high`: few, and two at least."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = {1: (1, 2, 3, 5, 7), 2: (1, 2, 5)}.get(last - first, (1,))
    step = math.ceil((last - first + 1) / MOST_TICKS)
    powers = range(first - step, last + 2 * step, step)
    numbers = [float(f"{digit}e{power}") for power in powers for digit in digits]
    usable = [number for number in numbers if 0 < number < math.inf]
    start = max((number for number in usable if number <= low), default=usable[0])
    end = min((number for number in usable if number >= high and number > start), default=usable[-1])
    return [number for number in usable if start <= number <= end]


def _power(value: float) -> str:
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"
