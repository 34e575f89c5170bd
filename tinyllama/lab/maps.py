"""What a change moved, as drawings: a map of layers and heads, and a bar for each layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Colours from a change of 0, which has its own, to 100% and more.
STEPS = 20
# In the SVGs' own units, pixels. All drawings of a change have the same rows.
LEFT, TOP, BOTTOM = 30, 20, 34
BAR, NUMBERS = 150, 52
MAP_WIDTH, CELL_WIDTHS = 306, (5, 26)
MAP_HEIGHT, ROW_HEIGHTS = 300, (13, 24)
LABEL_WIDTH = 18
# Of a cell, where the kernel was not put.
SMALL = 0.45


@dataclass(frozen=True)
class Mark:
    """One value, drawn as a rectangle.

    Attributes:
        key: of its figure, from that of the change.
        title: where it is and what it is, exactly.
        kind: its classes.
        x: left edge.
        y: upper edge.
        width: from left to right.
        height: from top to bottom.
    """

    key: str
    title: str
    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Label:
    """A text of a drawing, and where it stands."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """Marks in rows, one for each layer, the first layer on top.

    Attributes:
        title: what is drawn.
        largest: the largest value, and where it is; empty where nothing moved.
        width: of the drawing.
        height: of the drawing.
        marks: the values.
        rows: the layers' numbers, which end at their x.
        columns: what is under the rows, in the middle of their x.
        numbers: values in words, which end at their x.
    """

    title: str
    largest: str
    width: float
    height: float
    marks: tuple[Mark, ...]
    rows: tuple[Label, ...]
    columns: tuple[Label, ...]
    numbers: tuple[Label, ...] = ()

    @property
    def bottom(self) -> float:
        """Where the rows end."""
        return self.height - BOTTOM


def head_map(
    title: str, name: str, values: Sequence[Sequence[float]], layers: Collection[int], heads: Collection[int]
) -> Drawing:
    """A map of values (L, H), one for each head; small marks where the kernel was not put.

    Args:
        title: what they are.
        name: of the figures.
        values: relative changes; 1 is 100%.
        layers: where the kernel was put.
        heads: for which heads.
    """
    count = len(values[0])
    width, height = _fitting(MAP_WIDTH / count, CELL_WIDTHS), _row_height(len(values))
    marks = []
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            put = layer in layers and head in heads
            size = 1 if put else SMALL
            marks.append(
                Mark(
                    key=f"{name}.{layer}.{head}",
                    title=_title(f"layer {layer}, head {head}", put, value),
                    kind=f"{step(value)}{'' if put else ' without'}",
                    x=round(LEFT + width * (head + (1 - size) / 2), 2),
                    y=round(TOP + height * (layer + (1 - size) / 2), 2),
                    width=round(width * size - 1, 2),
                    height=round(height * size - 1, 2),
                )
            )
    every = math.ceil(LABEL_WIDTH / width)
    bottom = TOP + len(values) * height
    columns = [Label(LEFT + width * (head + 0.5), bottom + 14, str(head)) for head in range(0, count, every)]
    flat = [
        (value, f"layer {layer}, head {n}") for layer, row in enumerate(values) for n, value in enumerate(row)
    ]
    return Drawing(
        title=title,
        largest=_largest(flat),
        width=LEFT + count * width,
        height=bottom + BOTTOM,
        marks=tuple(marks),
        rows=_row_labels(len(values)),
        columns=(*columns, Label(LEFT + count * width / 2, bottom + 29, "head")),
    )


def layer_bars(title: str, name: str, values: Sequence[float], layers: Collection[int]) -> Drawing:
    """Bars for values (L,), one for each layer, to 100%; thin ones where the kernel was not put."""
    height = _row_height(len(values))
    marks = []
    for layer, value in enumerate(values):
        put = layer in layers
        size = 1 if put else SMALL
        marks.append(
            Mark(
                key=f"{name}.{layer}",
                title=_title(f"layer {layer}", put, value),
                kind="bar" if math.isfinite(value) else "unknown",
                x=LEFT,
                y=round(TOP + height * (layer + (1 - size) / 2), 2),
                width=round(BAR * _share(value), 2),
                height=round(height * size - 1, 2),
            )
        )
    bottom = TOP + len(values) * height
    right = LEFT + BAR + NUMBERS
    return Drawing(
        title=title,
        largest=_largest([(value, f"layer {layer}") for layer, value in enumerate(values)]),
        width=right + 1,
        height=bottom + BOTTOM,
        marks=tuple(marks),
        rows=_row_labels(len(values)),
        columns=tuple(Label(LEFT + BAR * share, bottom + 14, f"{share:.0%}") for share in (0, 0.5, 1)),
        numbers=tuple(
            Label(right, _middle(layer, height), moved(value)) for layer, value in enumerate(values)
        ),
    )


def step(value: float) -> str:
    """The class of a value's colour: s0 for no change at all, s1 to s20 for 0 to 100% and more."""
    return f"s{math.ceil(_share(value) * STEPS)}" if math.isfinite(value) else "unknown"


def moved(value: float) -> str:
    """A relative change in percent; the smallest are told apart from none."""
    if not math.isfinite(value):
        return "not finite"
    if value < 0.001:
        return "<0.1%" if value else "0%"
    return f"{value:.1%}" if value < 100 else f"{100 * value:.1e}%"


def _share(value: float) -> float:
    return min(value, 1.0) if math.isfinite(value) else 1.0


def _title(place: str, put: bool, value: float) -> str:
    return f"{place}{'' if put else ', without the kernel'}: {moved(value)} ({value!r})"


def _largest(values: Sequence[tuple[float, str]]) -> str:
    finite = [one for one in values if math.isfinite(one[0])]
    value, place = max(finite, key=lambda one: one[0], default=(0.0, ""))
    return f"{moved(value)} in {place}" if value else ""


def _fitting(size: float, limits: tuple[int, int]) -> float:
    return round(min(max(size, limits[0]), limits[1]), 2)


def _row_height(layers: int) -> float:
    return _fitting(MAP_HEIGHT / layers, ROW_HEIGHTS)


def _middle(layer: int, height: float) -> float:
    """Where a row's text stands, so that it is in the middle of the row."""
    return round(TOP + height * (layer + 0.5) + 3, 2)


def _row_labels(layers: int) -> tuple[Label, ...]:
    height = _row_height(layers)
    return tuple(Label(LEFT - 6, _middle(layer, height), str(layer)) for layer in range(layers))
