"""Where a token's time goes, and what the fast modes cost in quality, at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from tinyllama.bench.tables import heading, show_goals, table

Figures = dict[str, Any]


def show_profile(console: Console, results: Figures) -> None:
    """Each context's operations, then what grouped-query attention saves there."""
    heading(console, results)
    for part in results["profile"]:
        show_breakdown(console, part)
        show_sharing(console, part)


def show_breakdown(console: Console, part: Figures) -> None:
    """Time and bytes of every operation of a step, beside what reading those bytes must take."""
    step, apart, read = part["step"], part["apart"], part["bandwidth"]
    must = part["bytes"] / read * 1e3
    console.print(
        Text(
            f"{part['subject']}, a token at {part['context']:,} of context: {step * 1e3:.2f} ms; its "
            f"{part['bytes'] / 1e6:,.0f} MB at {read / 1e9:.1f} GB/s take {must:.2f} ms",
            "bold",
        )
    )
    made = table("operation", "ms", "share", "MB to read", "must take, ms", "GB/s")
    for row in part["operations"]:
        seconds, size = row["seconds"], row["bytes"]
        large = size >= 1e5  # of less than that the rate says nothing
        made.add_row(
            row["name"],
            f"{seconds * 1e3:.3f}",
            f"{seconds / apart:.1%}",
            f"{size / 1e6:.2f}" if size else "",
            f"{row['must'] * 1e3:.3f}" if size else "",
            f"{size / seconds / 1e9:.1f}" if large and seconds > 0 else "",
        )
    made.add_row("the step, part by part", f"{apart * 1e3:.3f}", "100%", f"{part['bytes'] / 1e6:.2f}")
    if part["compiled"]:
        made.add_row("as it is, each layer in one call", f"{step * 1e3:.3f}", f"{step / apart:.1%}")
    console.print(made)
    console.print(f"with the clock running a step takes {part['with_clock'] * 1e3:.2f} ms", "")


def show_sharing(console: Console, part: Figures) -> None:
    """KV heads against bytes and time."""
    made = table("what sharing KV heads saves", "KV bytes a token", "cache, MB", "attention, ms", "of a step")
    for row in part["sharing"]:
        made.add_row(
            f"{row['heads']} KV heads: {row['name']}",
            f"{row['bytes']:,}",
            f"{row['cache'] / 1e6:.1f}",
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['share']:.1%}",
        )
    console.print(made, "")


def show_quality(console: Console, results: Figures) -> None:
    """Each mode against the full weights."""
    heading(console, results)
    quality = results["quality"]
    made = table(
        f"to the full weights, {quality['positions']:,} positions", "KL mean", "KL max", "top-1", "perplexity"
    )
    for row in quality["rows"]:
        change = f"{row['ratio'] - 1:+.2%}"
        made.add_row(
            row["name"], f"{row['kl_mean']:.1e}", f"{row['kl_max']:.1e}", f"{row['top1']:.1%}", change
        )
    console.print(made, "")
    for name, reason in quality["left_out"].items():
        console.print(Text(f"{name}: {reason}"))
    show_goals(console, quality["goals"])
