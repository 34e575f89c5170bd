"""The benchmark's results at a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Figures = dict[str, Any]

WORDS = {True: "met", False: "NOT MET", None: "–"}
STYLES = {True: "green", False: "bold red", None: "dim"}


def show(console: Console, results: Figures) -> None:
    """Speeds, ratios, other sizes, loads and goals."""
    sizes = results["sizes"]
    heading(console, results)
    console.print(_speeds(results))
    console.print(
        f"medians of {sizes['rounds']} rounds in turn, {sizes['steps']} steps; "
        "± half the distance of the quartiles",
        "",
    )
    for kind, size, title in (("decode", "prompt", "decode"), ("prefill", "prefill", "prefill")):
        key = f"{kind}@{sizes[size]}"
        if any(key in row for peers in results["ratios"].values() for row in peers.values()):
            console.print(f"{title} at {sizes[size]:,}: ours over each peer", _ratios(results, key), "")
    console.print(_sizes(results), "")
    if any(subject["load"] for subject in results["subjects"].values()):
        console.print(_loads(results), "")
    for name, reason in results["left_out"].items():
        console.print(Text(f"{name}: {reason}"))
    console.print(
        Text("In the list: " + "; ".join(f"{k}: {v['is']}" for k, v in results["subjects"].items()))
    )
    console.print("")
    show_goals(console, results["goals"])


def heading(console: Console, results: Figures) -> None:
    """The machine, and what it can do."""
    machine = results["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "llama_cpp_python") if machine[name]
    )
    console.print(
        Text(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {versions}", "bold")
    )
    console.print(Text(results["settings"]["command"]))
    if "bandwidth" in results:
        peaks = ", ".join(f"{dtype} {value / 1e9:,.0f}" for dtype, value in results["peaks"].items())
        spread = _spread({key: value / 1e9 for key, value in results["bandwidth"].items()})
        console.print(Text(f"measured limits: reads {spread} GB/s; products in GFLOP/s: {peaks}"))
    console.print("")


def table(first: str, *heads: str) -> Table:
    """A plain table: names on the left, figures on the right."""
    made = Table(header_style="underline", box=None, padding=(0, 2, 0, 0))
    made.add_column(first, no_wrap=True)
    for head in heads:
        made.add_column(head, justify="right")
    return made


def _speeds(results: Figures) -> Table:
    sizes = results["sizes"]
    decode, prefill, batch = (
        f"{kind}@{sizes[size]}"
        for kind, size in (("decode", "prompt"), ("prefill", "prefill"), ("batch", "rows"))
    )
    made = table(
        "tokens/s",
        f"decode at {sizes['prompt']:,}",
        "of read bandwidth",
        f"prefill {sizes['prefill']:,}",
        f"batch {sizes['rows']}",
    )
    for name, subject in results["subjects"].items():
        figures = subject["figures"]
        speeds = [
            _spread(figures[key]["speed"]) if key in figures else "" for key in (decode, prefill, batch)
        ]
        share = f"{figures[decode]['bandwidth_share']['median']:.0%}" if decode in figures else ""
        made.add_row(name, speeds[0], share, *speeds[1:])
    for name in results["left_out"]:
        made.add_row(Text(name, "dim"), Text("left out", "dim"))
    return made


def _ratios(results: Figures, key: str) -> Table:
    peers = [
        name
        for name in results["subjects"]
        if any(key in row.get(name, {}) for row in results["ratios"].values())
    ]
    made = table("", *(peer.replace("-", " ").replace("llama.cpp", "llama .cpp") for peer in peers))
    for ours, by_peer in results["ratios"].items():
        found = [by_peer[peer].get(key) for peer in peers]
        if any(found):
            made.add_row(ours, *("" if ratio is None else f"{ratio:.2f}" for ratio in found))
    return made


def _sizes(results: Figures) -> Table:
    keys = {key: None for subject in results["subjects"].values() for key in subject["figures"]}
    ordered = sorted(
        (key for key in keys if not key.startswith("batch")), key=lambda key: (key.split("@")[0], _size(key))
    )
    made = table("tokens/s, median", *(f"{key.split('@')[0]} {_size(key):,}" for key in ordered))
    for name, subject in results["subjects"].items():
        figures = subject["figures"]
        made.add_row(name, *(number(figures[k]["speed"]["median"]) if k in figures else "" for k in ordered))
    return made


def _loads(results: Figures) -> Table:
    made = table("load to first token", "seconds", "with imports", "peak GB", "weights GB")
    for name, subject in results["subjects"].items():
        if load := subject["load"]:
            sizes = ["" if load[key] is None else f"{load[key] / 1e9:.2f}" for key in ("bytes", "weights")]
            made.add_row(name, _spread(load["seconds"], 2), _spread(load["with_import"], 2), *sizes)
    return made


def show_goals(console: Console, goals: Sequence[Mapping[str, Any]]) -> None:
    """Each goal beside what was measured."""
    made = Table(header_style="underline", box=None, padding=(0, 2, 0, 0))
    for head in ("goal", "asked", "measured", ""):
        made.add_column(head, overflow="fold", no_wrap=head in ("goal", ""))
    for goal in goals:
        met = goal["met"]
        made.add_row(goal["name"], goal["goal"], goal["measured"], Text(WORDS[met], STYLES[met]))
    console.print(made)


def number(value: float) -> str:
    """Three digits: 6.58, 71.3, 274."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _spread(spread: Mapping[str, float], digits: int | None = None) -> str:
    """`6.58 ±3%`: the median, and half of what lies between the quartiles."""
    middle = spread["median"]
    shown = number(middle) if digits is None else f"{middle:.{digits}f}"
    return f"{shown} ±{(spread['high'] - spread['low']) / 2 / middle:.0%}"


def _size(key: str) -> int:
    return int(key.split("@")[1])
