"""The benchmark's results as one picture: a panel for each figure, a bar for each peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama.bench.results import PeerResult, Results
from tinyllama.checkpoints.files import replace_file

# Okabe and Ito's colours, which colour-blind readers can tell apart.
OURS, TRANSFORMERS, LLAMA_CPP = "#0072B2", "#D55E00", "#009E73"
INK, FAINT = "#222222", "#999999"


def write_png(path: Path, found: Results) -> None:
    """Draw the speeds into a PNG file: bars are medians, lines go from the slowest to the fastest round.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figures = found.figures
    height = 1.6 + 0.35 * len(found.peers)
    small = {"font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK}
    with matplotlib.rc_context(small):
        picture = Figure(figsize=(3.2 * len(figures) + 1.5, height), dpi=120, layout="constrained")
        panels = picture.subplots(1, len(figures), sharey=True, squeeze=False)[0]
        for panel, figure in zip(panels, figures, strict=True):
            draw(panel, figure, found.peers)
        panels[0].invert_yaxis()  # the first peer at the top
        picture.suptitle(str(found.run), x=0.01, ha="left", fontsize=9)
        replace_file(path, lambda partial: picture.savefig(partial, format="png", facecolor="white"))


def draw(panel: Any, figure: str, peers: Sequence[PeerResult]) -> None:
    """One figure of every peer."""
    for place, peer in enumerate(peers):
        if rate := peer.speeds.get(figure):
            reach = [[rate.median - rate.slowest], [rate.fastest - rate.median]]
            panel.barh(place, rate.median, xerr=reach, color=colour(peer), ecolor=INK, height=0.7)
    panel.set_yticks(range(len(peers)), [peer.name for peer in peers])
    panel.set_title(figure, loc="left", fontsize=10)
    panel.set_xlabel("tokens/s")
    panel.spines[["top", "right"]].set_visible(False)


def colour(peer: PeerResult) -> str:
    """One for each implementation."""
    if peer.name.startswith("transformers"):
        return TRANSFORMERS
    return LLAMA_CPP if peer.name.startswith("llama.cpp") else OURS
