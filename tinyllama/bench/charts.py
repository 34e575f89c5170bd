"""The benchmark's results as one picture: decode against context, prefill against length, the roofline."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError

Figures = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart: one for each implementation.
COLOURS = {"ours": "#0072B2", "hf": "#D55E00", "llama.cpp": "#009E73"}
LINES = {"ours": "-", "hf": "--", "llama.cpp": ":"}
# By the width of the weights.
MARKERS = {"32": "o", "16": "s", "8": "^"}
# Drawn hollow: the second of two that share colour and marker.
HOLLOW = (
    "ours-exact",
    "ours-bfloat16",
    "ours-int8-bfloat16",
    "hf-float16",
    "hf-compiled-float32",
    "hf-compiled-bfloat16",
)
INK, FAINT = "#222222", "#999999"


def require_matplotlib() -> None:
    """Raise InputError, before anything is measured for a chart, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("png: matplotlib is not installed: pip install matplotlib, or leave --png out")


def write_png(path: Path, results: Figures) -> None:
    """Draw the results of `suite.measure` into a PNG file.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    small = {"font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK}
    with matplotlib.rc_context(small):
        layout = ConstrainedLayoutEngine(rect=(0, 0.15, 1, 0.8), w_pad=0.15)
        figure = Figure(figsize=(15, 6.4), dpi=120, layout=layout)
        panels = figure.subplots(1, 3)
        _lines(panels[0], results, "decode", "tokens of context", "Decode, one text")
        _lines(panels[1], results, "prefill", "tokens of the prompt", "Prefill")
        _roofline(panels[2], results)
        handles = [_handle(name) for name in results["subjects"]]
        figure.legend(
            handles=handles, loc="lower center", ncols=6, frameon=False, bbox_to_anchor=(0.5, 0.055)
        )
        _slope_label(panels[2], results["bandwidth"]["median"])
        figure.text(0.01, 0.015, _footer(results), color=FAINT, fontsize=8)
        figure.suptitle("tinyllama beside its peers, in one run", x=0.01, ha="left", fontweight="bold")
        try:
            figure.savefig(path, format="png", facecolor="white")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give another place") from error


def style(name: str) -> dict[str, Any]:
    """How a subject is drawn, everywhere the same."""
    family = next(family for family in COLOURS if name.startswith(family))
    width = "8" if "int8" in name or "q8" in name else "32" if name.endswith(("float32", "exact")) else "16"
    width = "16" if name.endswith(("bfloat16", "float16", "mixed")) and width != "8" else width
    colour = COLOURS[family]
    return {
        "color": colour,
        "linestyle": LINES[family],
        "marker": MARKERS[width],
        "markerfacecolor": "white" if name in HOLLOW else colour,
        "markersize": 6,
        "linewidth": 1.3,
    }


def _handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=name, **style(name))


def _lines(panel: Any, results: Figures, kind: str, label: str, title: str) -> None:
    """Speed against size, from zero; bars are quartiles."""
    sizes = set()
    for name, subject in results["subjects"].items():
        points = sorted(
            (int(key.split("@")[1]), figure["speed"])
            for key, figure in subject["figures"].items()
            if key.startswith(f"{kind}@")
        )
        if not points:
            continue
        xs, middle = [x for x, _ in points], [speed["median"] for _, speed in points]
        down = [speed["median"] - speed["low"] for _, speed in points]
        up = [speed["high"] - speed["median"] for _, speed in points]
        panel.errorbar(xs, middle, yerr=[down, up], elinewidth=0.8, **style(name))
        sizes |= set(xs)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(sizes), [f"{size:,}" for size in sorted(sizes)])
    panel.minorticks_off()
    panel.set_ylim(0, 1.06 * panel.get_ylim()[1])
    _finish(panel, title, label, "tokens/s")


def _roofline(panel: Any, results: Figures) -> None:
    """What bandwidth and products allow, and what each subject reaches (Williams et al. 2009)."""
    bandwidth, peaks = results["bandwidth"]["median"], results["peaks"]
    reached: list[tuple[float, float]] = []
    for name, subject in results["subjects"].items():
        points = sorted(
            (figure["flops"] / figure["bytes"], figure["flops"] / seconds(figure) / 1e9)
            for key, figure in subject["figures"].items()
            if not key.startswith("decode@") or key == f"decode@{results['sizes']['prompt']}"
        )
        reached += points
        if points:
            panel.plot(*zip(*points, strict=True), **{**style(name), "linestyle": "none"})
    xs = [x for x, _ in reached] or [1.0]
    low, high = min(xs) / 8, max(xs) * 2  # room for the labels, where no point can be
    for dtype, peak in peaks.items():
        knee = peak / bandwidth
        panel.plot(
            [min(low, knee), knee, high],
            [min(low, knee) * bandwidth / 1e9, peak / 1e9, peak / 1e9],
            color=INK,
            linewidth=1,
        )
        panel.annotate(
            f"{dtype}: {peak / 1e9:,.0f} GFLOP/s",
            (low, peak / 1e9),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=8,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, high)
    _finish(
        panel,
        "Roofline: decode, batch, prefill from left to right",
        "FLOP for each byte that must be read",
        "GFLOP/s",
    )


def _slope_label(panel: Any, bandwidth: float) -> None:
    """Along the slope, on its upper side; where that is is known once all is laid out."""
    panel.figure.draw_without_rendering()
    x, slope = panel.get_xlim()[0] * 1.4, bandwidth / 1e9
    (x0, y0), (x1, y1) = panel.transData.transform([(x, x * slope), (10 * x, 10 * x * slope)])
    angle = math.atan2(y1 - y0, x1 - x0)
    panel.annotate(
        f"memory: {slope:.1f} GB/s",
        (x, x * slope),
        xytext=(-4 * math.sin(angle), 4 * math.cos(angle)),
        textcoords="offset points",
        fontsize=8,
        rotation=math.degrees(angle),
        rotation_mode="anchor",
    )


def seconds(figure: Figures) -> float:
    """The median of what a step or a prefill took."""
    return sorted(figure["seconds"])[len(figure["seconds"]) // 2]


def _finish(panel: Any, title: str, across: str, up: str) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.grid(color="#E5E5E5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _footer(results: Figures) -> str:
    machine, sizes = results["machine"], results["sizes"]
    parts: Sequence[str] = (
        machine["gpu"] or machine["cpu"],
        f"{machine['threads']} threads",
        f"torch {machine['torch']}",
        f"{sizes['rounds']} rounds in turn, medians with quartiles",
        f"{sizes['steps']} decode steps",
        f"batch of {sizes['rows']}",
        f"{results['settings']['parameters'] / 1e6:,.0f} million random weights",
    )
    return " · ".join(parts)
