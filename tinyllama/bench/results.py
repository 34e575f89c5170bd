"""Everything that a run measured in one plain dictionary: figures, spreads, ratios, shares of the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tinyllama.bench.measure import Figure, Rounds, Spread, Subject
from tinyllama.bench.names import LEGEND
from tinyllama.config import LlamaConfig

Figures = dict[str, Any]

OURS = "ours"


def flops(config: LlamaConfig, figure: Figure) -> int:
    """Floating-point operations of a step or a prefill, by matrices and attention; a multiply-add is two.

    A prefill asks the head for its last token alone, and a token of it sees half of the others.
    """
    parts = config.parameters
    body, head = 2 * (parts["attention"] + parts["mlp"]), 2 * config.vocab_size * config.hidden_size
    attention = (
        4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    )  # for each key seen
    if figure.kind == "prefill":
        return figure.size * (body + attention * figure.size // 2) + head
    rows = figure.size if figure.kind == "batch" else 1
    return rows * (body + head + attention * figure.context)


def bytes_moved(subject: Subject, figure: Figure) -> int:
    """What a step must read; of a prefill the weights, once, and the keys and values that it makes."""
    if figure.kind == "prefill":
        return subject.bytes_read(1, figure.size)
    return subject.bytes_read(figure.size if figure.kind == "batch" else 1, figure.context)


def collect(
    config: LlamaConfig,
    subjects: Sequence[Subject],
    figures: Sequence[Figure],
    rounds: Rounds,
    loads: Mapping[str, Sequence[Figures]],
    left_out: Mapping[str, str],
) -> Figures:
    """The results of a run.

    Speeds are tokens a second, bandwidths and shares are of that figure's own rounds, ratios are those of
    medians: ours over the peer's.
    """
    by_name = {}
    for subject in subjects:
        taken = rounds.seconds[subject.name]
        by_name[subject.name] = {
            "is": LEGEND.get(subject.name, subject.name),
            "figures": {
                figure.key: _figure(config, subject, figure, taken[figure.key], rounds.bandwidth[figure.key])
                | {"beside": _beside(figure, rounds.ratios[subject.name].get(figure.key))}
                for figure in figures
                if figure.key in taken
            },
            "load": _load(loads.get(subject.name, ())),
        }
    every = [value for values in rounds.bandwidth.values() for value in values]
    return {
        "bandwidth": asdict(Spread.of(every)),
        "peaks": {dtype: max(values) for dtype, values in rounds.peaks.items()},
        "subjects": by_name,
        "left_out": dict(left_out),
        "ratios": ratios(by_name),
    }


def _figure(
    config: LlamaConfig,
    subject: Subject,
    figure: Figure,
    seconds: Sequence[float],
    bandwidth: Sequence[float],
) -> Figures:
    tokens, moved = figure.tokens, bytes_moved(subject, figure)
    shares = [moved / taken / read for taken, read in zip(seconds, bandwidth, strict=True)]
    return {
        "speed": asdict(Spread.of([tokens / taken for taken in seconds])),
        "seconds": list(seconds),
        "bytes": moved,
        "flops": flops(config, figure),
        "bandwidth_share": None if figure.kind == "prefill" else asdict(Spread.of(shares)),
    }


def _beside(figure: Figure, ratios: Sequence[float] | None) -> Figures | None:
    """Its speed over that of the figure beside it, round by round."""
    return {"figure": figure.beside.key} | asdict(Spread.of(ratios)) if figure.beside and ratios else None


def _load(loads: Sequence[Figures]) -> Figures | None:
    if not loads:
        return None
    spreads: Figures = {
        key: asdict(Spread.of([load[key] for load in loads])) for key in ("seconds", "with_import")
    }
    sizes = [load["bytes"] for load in loads]
    spreads["bytes"] = None if None in sizes else Spread.of(sizes).median
    return spreads | {"weights": loads[0]["weights"]}


def ratios(by_name: Mapping[str, Figures]) -> Figures:
    """Of our median speeds to each peer's, by our mode, the peer and the figure."""
    return {
        ours: {
            peer: {
                key: mine["figures"][key]["speed"]["median"] / figure["speed"]["median"]
                for key, figure in theirs["figures"].items()
                if key in mine["figures"]
            }
            for peer, theirs in by_name.items()
            if not peer.startswith(OURS)
        }
        for ours, mine in by_name.items()
        if ours.startswith(OURS)
    }
