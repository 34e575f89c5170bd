"""The scorecard at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.hooks import addresses, numel, shape
from tinyllama.lab.continuation import Continuation
from tinyllama.lab.figures import Cache, Card, Prediction, Results, Scorecard
from tinyllama.lab.perplexity import Perplexity
from tinyllama.model import Llama
from tinyllama.progress import escape
from tinyllama.ranges import ranges

# Of a change from 0 to 100%, for maps of one character a head.
SHADES = " ·░▒▓█"


def show(console: Console, card: Scorecard) -> None:
    """Print every change in a table, then each by itself."""
    for one in card.changes:
        if not one.passed:
            _show_broken(console, one)
    measured = [(one, one.results) for one in card.changes if one.results is not None]
    if measured:
        texts = ", ".join(f"{escape(name)} {count}" for name, count in card.texts.items())
        own = ", ".join(card.model.kernels)
        console.print(Text(f"beside the unchanged model ({own}), on {texts} tokens", style="bold"))
        console.print(_summary(measured), "")
    for one, results in measured:
        _show_card(console, card, one, results)


def _show_broken(console: Console, card: Card) -> None:
    console.print(Text(f"{card.name}: breaks the contract, so nothing else is measured"))
    for clause in card.contract:
        if clause.verdict == "BROKEN":
            console.print(Text(f"  {clause.name}: {clause.says}\n    {escape(clause.example or '')}"))
    if card.remedy:
        console.print(Text(card.remedy))
    console.print()


def _summary(measured: Sequence[tuple[Card, Results]]) -> Table:
    table = Table(header_style="underline", box=None, padding=(0, 1, 0, 0))
    # The one column that may fold: a number that is cut short would mislead.
    table.add_column("kernel", overflow="fold", min_width=12)
    for head in ("perplexity (95%)", "KL", "top-1", "prefill", "decode", "cache"):
        table.add_column(head, justify="right", no_wrap=True)
    for card, results in measured:
        speed = results.speed
        table.add_row(
            Text(escape(Path(card.name).name)),  # of file.py:function, without the folder
            change(results.all),
            f"{results.all.kl_mean:.1e}",
            f"{results.all.top1:.1%}",
            "" if speed is None else times(speed.prefill_ratio),
            "" if speed is None else times(speed.decode_ratio),
            f"{results.cache.share:.0%}",
        )
    return table


def _show_card(console: Console, whole: Scorecard, card: Card, results: Results) -> None:
    console.print(Text(f"{escape(card.name)}, layers {ranges(card.layers)}", style="bold"))
    declared = [clause for clause in card.contract if clause.verdict == "declared"]
    console.print(f"contract: {len(card.contract) - len(declared)} clauses kept")
    for clause in declared:
        console.print(Text(f"  {clause.name}: broken, as declared: {escape(clause.example or '')}"))
    for row in [*results.texts, results.all] if len(results.texts) > 1 else results.texts:
        console.print(Text(f"{escape(row.text)}: {prediction(row)}"))
    console.print(Text(cache(results.cache)))
    top = len(SHADES) - 1
    legend = ", ".join(f"{shade} from {(n - 1) / top:.0%}" for n, shade in enumerate(SHADES) if n)
    console.print(Text(f"relative change of each head's output: {legend}"))
    table = Table(header_style="underline", box=None, padding=(0, 2, 0, 0))
    for head in ("layer", "this head alone changed", "whole change", "residual stream"):
        table.add_column(head, justify="right" if head in ("layer", "residual stream") else "left")
    for layer, moved in enumerate(results.layers_changed):
        alone, total = (shades(one[layer]) for one in (results.heads_direct, results.heads_changed))
        table.add_row(str(layer), alone, total, f"{moved:.1%}")
    console.print(table, "")
    for mine, own in zip(results.continuations, whole.unchanged.continuations, strict=True):
        _show_continuation(console, mine, own)
    console.print()


def _show_continuation(console: Console, mine: Continuation, own: Continuation) -> None:
    console.print(Text(shortened(mine.prompt), style="underline"))
    same = shortened(mine.same, 160)
    if mine.parts_at is None:
        console.print(Text(f"  the same {len(mine.ids)} tokens: {same}"))
        return
    console.print(Text(f"  {mine.parts_at} tokens the same: {same}"))
    console.print(Text(f"  unchanged ▸{shortened(mine.split(own.same)[1], 160)}"))
    console.print(Text(f"  changed   ▸{shortened(mine.rest, 160)}", style="bold"))


def show_addresses(console: Console, model: Llama, tokens: int) -> None:
    """Print the addresses, with the shapes and sizes of their values for one text; layers count as one."""
    config, dtype = model.config, model.embed_tokens.weight.dtype
    count = config.num_hidden_layers
    console.print(
        f"addresses, and sizes for a text of {tokens} tokens in {str(dtype).removeprefix('torch.')}"
    )
    table = Table(header_style="underline", box=None, padding=(0, 2, 0, 0))
    table.add_column("address", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("MB", justify="right")
    for address in addresses(model):
        part = address.split(".")
        if part[0] == "layers" and part[1] != "0":
            continue
        size = numel(config, address, 1, tokens, tokens) * dtype.itemsize / 1e6
        if part[0] == "layers":
            part[1], size = "*", size * count
        table.add_row(".".join(part), f"({shape(address).replace(' ', ', ')})", f"{size:,.1f}")
    console.print(table)
    console.print(
        f"layers.0 to layers.{count - 1}; B rows, T queries, S keys, C = {config.hidden_size}, "
        f"H = {config.num_attention_heads}, K = {config.num_key_value_heads}, D = {config.head_dim}, "
        f"F = {config.intermediate_size}, V = {config.vocab_size}. "
        "layers.N is the residual stream after that layer. scores and pattern: under --attention eager."
    )


def prediction(figures: Prediction) -> str:
    """How a text is predicted, on one line."""
    return (
        f"perplexity {grouped(figures.before)} → {grouped(figures.after)}, {change(figures)}; "
        f"KL {figures.kl_mean:.1e}, top-1 {figures.top1:.1%}"
    )


def cache(figures: Cache) -> str:
    """What a KV cache would need, on one line."""
    needed = "not known, so all count" if figures.needed is None else f"{figures.needed:.0%} still read"
    return (
        f"cache of {figures.of} tokens: {figures.bytes / 1e6:,.2f} MB, {figures.share:.0%} of the unchanged "
        f"model's; keys: {needed}; bytes of each: {figures.kept:.0%}"
    )


def change(figures: Perplexity) -> str:
    """The change of perplexity in percent, with its interval."""
    if figures.low is None or figures.high is None:
        return percent(figures.ratio)
    return f"{percent(figures.ratio)} ({percent(figures.low)} to {percent(figures.high)})"


def percent(ratio: float) -> str:
    """A ratio as a change: +3.1%, +112%, or ×40 from ten times on."""
    if ratio >= 10:
        return f"×{grouped(ratio, 3)}"
    change = round(ratio - 1, 3) + 0.0  # no -0.0%
    return f"{change:+.1%}" if ratio < 2 else f"{change:+.0%}"


def grouped(value: float, digits: int = 4) -> str:
    """A perplexity or a ratio: 11.28, 15,810, and from a million on 2.1e+07."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:#.{digits}g}" if value < 10 ** (digits - 1) else f"{value:,.0f}"


def times(ratio: float | None) -> str:
    """A ratio of speeds."""
    return "none" if ratio is None else f"{ratio:.2f}×"


def shades(values: Sequence[float]) -> str:
    """One character for each value, from 0 to 100% and more; only 0 is a blank."""
    top = len(SHADES) - 1
    return "".join(SHADES[min(top, int(value * top + (value > 0)))] for value in values)


def shortened(text: str, length: int = 60) -> str:
    """On one line, cut to a length."""
    line = escape(text.replace("\n", "⏎"))
    return line if len(line) <= length else line[: length - 1] + "…"
