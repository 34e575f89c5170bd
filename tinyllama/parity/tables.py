"""The results at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Figures = dict[str, Any]

BITS = {None: "", True: "same", False: "not"}


def show_case(console: Console, case: Figures) -> None:
    """One model in one dtype: every implementation's errors against the oracle."""
    texts = ", ".join(f"{name} {count}" for name, count in case["texts"].items())
    table = _table(f"{case['model']} {case['dtype']}, {case['positions']} positions ({texts})")
    # The one column that may fold: a figure that is cut short is none.
    table.add_column("against float64", min_width=len("transformers eager"), overflow="fold")
    for head in ("relRMS", "max", "KL mean", "KL max", "top-1", "NLL", "bits", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for row in case["rows"]:
        table.add_row(
            Text(row["who"]),
            number(row["relative"], 2),
            number(row["max"]),
            number(row["kl_mean"]),
            number(row["kl_max"]),
            "" if row["top1"] is None else f"{row['top1']:.1%}",
            "" if row["nll_change"] is None else f"{row['nll_change']:+.0e}",
            BITS[row["same_bits"]],
            "" if row["reference"] else "FAILED" if row["failures"] else "passed",
        )
    console.print(table, Text(f"{case['note']}\n" if case["note"] else ""))


def show_continuations(console: Console, parts: list[Figures]) -> None:
    """Ids beside transformers'."""
    table = _table("Ids beside transformers' generate")
    table.add_column("model")
    table.add_column("what", no_wrap=True)
    for head in ("calls", "ids", "near-ties", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for part in parts:
        verdict = "FAILED" if part["failures"] else "near-ties" if part["flips"] else "the same"
        flips = str(len(part["flips"]))
        name = Text(f"{part['model']} {part['dtype']}")
        table.add_row(name, Text(part["what"]), str(part["calls"]), str(part["ids"]), flips, verdict)
    console.print(table, "")


def show_gradients(console: Console, parts: list[Figures]) -> None:
    """Gradients of every weight, and the one that is nearest to its limit."""
    table = _table("Gradients of the loss")
    table.add_column("model")
    for head in ("weights", "same bits", "relRMS", "R"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("of")
    table.add_column("", no_wrap=True)
    for part in parts:
        worst = part["worst"]
        table.add_row(
            Text(f"{part['model']} {part['dtype']}"),
            str(part["weights"]),
            str(part["same_bits"]),
            number(worst["relative"]),
            number(worst["reference"]),
            Text(worst["weight"]),
            "FAILED" if part["failures"] else "passed",
        )
    console.print(table, "")


def show_mutations(console: Console, trials: list[Figures]) -> None:
    """What the gate and the search made of each planted bug."""
    right = sum(trial["right"] for trial in trials)
    table = _table(f"Planted bugs: {right} of {len(trials)} judged rightly")
    table.add_column("bug", max_width=19)
    table.add_column("R", justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    table.add_column("first divergence: suspect")
    for trial in trials:
        gate = ("passes" if trial["passed"] else "fails") + ("" if trial["right"] else ", WRONG")
        found = f"{trial['address']}: {trial['suspect']}" if trial["address"] else "none"
        score = "" if trial["score"] is None else f"{trial['score']:.3g}"
        table.add_row(trial["name"], score, gate, Text(found))
    console.print(table, "")


def show_search(console: Console, search: Figures) -> None:
    """Where one implementation diverges first."""
    title = f"{search['model']} {search['dtype']}, {search['who']}, on {search['text']}"
    found = search["found"]
    if found is None:
        console.print(Text(f"{title}: no divergence\n"))
        return
    console.print(Text(f"{title}: first divergence at {found['address']}, shape {found['shape']}"))
    if found["place"]:
        console.print(
            Text(
                f"  relRMS {number(found['relative'])}, the limit is {number(found['limit'])}; at "
                f"{found['place']} got {number(found['got'], 8)}, expected {number(found['expected'], 8)}, "
                f"the reference has {number(found['theirs'], 8)}"
            )
        )
    console.print(Text(f"  suspect: {found['suspect'] or 'none that is known'}\n"))


def number(value: float | None, digits: int = 1) -> str:
    """A number in few characters; what is not finite is told apart from nothing."""
    return "not finite" if value is None else "0" if value == 0 else f"{value:.{digits}e}"


def _table(title: str) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        header_style="underline",
        box=None,
        padding=(0, 1, 0, 0),
    )
