"""Charts of lines as points to be drawn; `drawing` of macros.html draws one."""

from __future__ import annotations

import math
from dataclasses import dataclass

# In the SVG's own units. The left margin holds "1e-16" in the larger type that phones get.
WIDTH, HEIGHT = 460, 276
LEFT, RIGHT, TOP, BOTTOM = 56, 444, 26, 226
MOST_TICKS = 8
COLOURS = 8  # styles of lines, series-0 to series-7


@dataclass(frozen=True)
class Tick:
    """A number on an axis: where it stands, and how it reads."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line with gaps where a value cannot be drawn.

    Attributes:
        name: in the legend.
        style: the line's class in the style sheet.
        lines: points of each unbroken part.
        dots: (x, y) of points that are drawn by themselves.
    """

    name: str
    style: str
    lines: tuple[str, ...]
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over an axis.

    Attributes:
        title: what is drawn.
        measure: the y axis's name.
        axis: what the x axis counts.
        ends: names under the first and the last x.
        xs: ticks of the x axis.
        ys: ticks of the y axis.
        band: outlines of an area behind the lines.
        band_name: its name in the legend; empty without one.
        curves: the lines.
        notes: what cannot be drawn.
    """

    title: str
    measure: str
    axis: str
    ends: tuple[str, str]
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    band: tuple[str, ...]
    band_name: str
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]


def across(share: float) -> float:
    """Where a share of the x axis is in the drawing."""
    return round(LEFT + share * (RIGHT - LEFT), 2)


def tick_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, so that few steps make up the count."""
    return round(rounded_up(max(count / MOST_TICKS, 1)))


def rounded_up(value: float) -> float:
    """1, 2 or 5 times a power of ten, at or above a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{n * power:.1g}") for n in (1, 2, 5, 10) if n * power >= value * (1 - 1e-9))
