"""The scorecard at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.hooks import addresses, numel, shape
from tinyllama.model import Llama
from tinyllama.progress import escape

Figures = dict[str, Any]

# From a small to a large change, for maps of one character a head.
SHADES = " ·░▒▓█"
LARGE = 1.0


def show(console: Console, figures: Figures) -> None:
    """Every change in a table, then each by itself."""
    cards = figures["changes"]
    for card in cards:
        if not card["passed"]:
            _show_broken(console, card)
    measured = [card for card in cards if card["passed"]]
    if measured:
        texts = ", ".join(f"{escape(name)} {count}" for name, count in figures["texts"].items())
        own = ", ".join(figures["model"]["kernels"])
        console.print(Text(f"beside the unchanged model ({own}), on {texts} tokens", style="bold"))
        console.print(_summary(figures, measured), "")
    for card in measured:
        _show_card(console, figures, card)


def _show_broken(console: Console, card: Figures) -> None:
    console.print(Text(f"{card['name']}: breaks the contract, so it is measured no further"))
    for clause in card["contract"]:
        if clause["verdict"] == "BROKEN":
            console.print(Text(f"  {clause['clause']}: {clause['says']}\n    {escape(clause['example'])}"))
    console.print()


def _summary(figures: Figures, cards: list[Figures]) -> Table:
    table = Table(header_style="underline", box=None, padding=(0, 1, 0, 0))
    # The one column that may fold: a figure that is cut short is none.
    table.add_column("kernel", overflow="fold", min_width=12)
    for head in ("perplexity (95%)", "KL", "top-1", "prefill", "decode", "keys"):
        table.add_column(head, justify="right", no_wrap=True)
    for card in cards:
        whole, speed, needed = card["all"], card.get("speed"), card["keys"]["needed"]
        table.add_row(
            Text(escape(card["name"])),
            change(whole),
            f"{whole['kl_mean']:.1e}",
            f"{whole['top1']:.1%}",
            "" if speed is None else times(speed["prefill_ratio"]),
            "" if speed is None else times(speed["decode_ratio"]),
            "" if needed is None else f"{needed:.0%}",
        )
    return table


def _show_card(console: Console, figures: Figures, card: Figures) -> None:
    console.print(Text(f"{escape(card['name'])}, layers {ranges(card['layers'])}", style="bold"))
    declared = [clause for clause in card["contract"] if clause["verdict"] == "declared"]
    console.print(f"contract: {len(card['contract']) - len(declared)} clauses kept")
    for clause in declared:
        console.print(Text(f"  {clause['clause']}: broken, as declared: {escape(clause['example'])}"))
    for row in card["texts"]:
        console.print(Text(f"{escape(row['text'])}: {prediction(row)}"))
    if len(card["texts"]) > 1:
        console.print(Text(f"all: {prediction(card['all'])}"))
    console.print(Text(f"change of each head's output, relative to it: {legend()}"))
    console.print(_map(card), "")
    for mine, own in zip(card["continuations"], figures["unchanged"]["continuations"], strict=True):
        _show_continuation(console, mine, own)
    console.print()


def prediction(figures: Figures) -> str:
    """How a text is predicted, on one line."""
    return (
        f"perplexity {grouped(figures['before'])} → {grouped(figures['after'])}, {change(figures)}; "
        f"KL {figures['kl_mean']:.1e}, top-1 {figures['top1']:.1%}"
    )


def _map(card: Figures) -> Table:
    """One line a layer: each head's own change, and how far its output and the layer's moved in the end."""
    table = Table(header_style="underline", box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("by itself")
    table.add_column("in the end")
    table.add_column("layer's result", justify="right")
    for layer, moved in enumerate(card["layers_changed"]):
        table.add_row(
            str(layer),
            shades(card["heads_direct"][layer]),
            shades(card["heads_changed"][layer]),
            f"{moved:.1%}",
        )
    return table


def _show_continuation(console: Console, mine: Figures, own: Figures) -> None:
    console.print(Text(f"{shortened(mine['prompt'])}", style="underline"))
    if mine["parts_at"] is None:
        console.print(Text(f"  the same {len(mine['ids'])} tokens: {shortened(mine['same'], 160)}"))
        return
    before = own["same"][len(mine["same"]) :] if own["same"].startswith(mine["same"]) else own["same"]
    console.print(Text(f"  {mine['parts_at']} tokens the same: {shortened(mine['same'], 160)}"))
    console.print(Text(f"  unchanged ▸{shortened(before, 160)}"))
    console.print(Text(f"  changed   ▸{shortened(mine['rest'], 160)}", style="bold"))


def show_addresses(console: Console, model: Llama, tokens: int) -> None:
    """Every address of layer 0 and outside the layers, with shape and size for one text; layers are alike."""
    dtype = model.embed_tokens.weight.dtype
    count = model.config.num_hidden_layers
    console.print(
        f"addresses, and sizes for a text of {tokens} tokens in {str(dtype).removeprefix('torch.')}"
    )
    table = Table(header_style="underline", box=None, padding=(0, 2, 0, 0))
    for head in ("address", "shape"):
        table.add_column(head, no_wrap=True)
    table.add_column("MB", justify="right")
    for address in addresses(model):
        part = address.split(".")
        if part[0] == "layers" and part[1] != "0":
            continue
        name = ".".join(["layers", "*", *part[2:]]) if part[0] == "layers" else address
        size = numel(model.config, address, 1, tokens, tokens) * dtype.itemsize
        size *= count if part[0] == "layers" else 1
        table.add_row(name, f"({shape(address).replace(' ', ', ')})", f"{size / 1e6:,.1f}")
    console.print(table)
    config = model.config
    console.print(
        f"layers.0 to layers.{count - 1}; B rows, T queries, S keys, C = {config.hidden_size}, "
        f"H = {config.num_attention_heads}, K = {config.num_key_value_heads}, D = {config.head_dim}, "
        f"F = {config.intermediate_size}, V = {config.vocab_size}. "
        "layers.N is the residual stream after it. scores and pattern: under --attention eager."
    )


def change(figures: Figures) -> str:
    """The change of perplexity in percent, with its interval."""
    if figures["low"] is None:
        return percent(figures["ratio"])
    return f"{percent(figures['ratio'])} ({percent(figures['low'])} to {percent(figures['high'])})"


def percent(ratio: float) -> str:
    """A ratio as a change: +3.1%, +112%, or ×40 where percents say nothing."""
    if ratio >= 10:
        return f"×{grouped(ratio, 3)}"
    change = round(ratio - 1, 3) + 0.0  # no -0.0%
    return f"{change:+.1%}" if ratio < 2 else f"{change:+.0%}"


def grouped(value: float, digits: int = 4) -> str:
    """A perplexity or a ratio: 11.28, 15,810, and 2.1e+07 where no digit is worth it."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:#.{digits}g}" if value < 10 ** (digits - 1) else f"{value:,.0f}"


def times(ratio: float | None) -> str:
    """A ratio of speeds."""
    return "none" if ratio is None else f"{ratio:.2f}×"


def shades(values: list[float]) -> str:
    """One character for each value, from nothing to 100% and more."""
    top = len(SHADES) - 1
    return "".join(SHADES[min(top, int(value / LARGE * top + (value > 0)))] for value in values)


def legend() -> str:
    """What the characters of `shades` stand for."""
    top = len(SHADES) - 1
    return ", ".join(f"{shade} from {(n - 1) / top:.0%}" for n, shade in enumerate(SHADES) if n)


def ranges(numbers: list[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def shortened(text: str, length: int = 60) -> str:
    """On one line, cut to a length."""
    line = escape(text.replace("\n", "⏎"))
    return line if len(line) <= length else line[: length - 1] + "…"
