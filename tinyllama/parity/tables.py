"""A report at a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.cli.terminal import visible
from tinyllama.parity.continuations import Continuations
from tinyllama.parity.gradients import Gradients
from tinyllama.parity.mutations import Trial
from tinyllama.parity.report import Case, Report, Row, Search

BITS = {None: "", True: "same", False: "differ"}


def show(report: Report) -> None:
    """Print every result as a table, the verdict last."""
    console = Console(highlight=False)
    for case in report.cases:
        console.print(case_table(case), Text(f"{case.note}\n" if case.note else ""))
    if report.continuations:
        console.print(continuations_table(report.continuations), "")
    if report.gradients:
        console.print(gradients_table(report.gradients), "")
    if report.mutations:
        console.print(mutations_table(report.mutations), "")
    for search in report.searches:
        console.print(Text(f"{search_lines(search)}\n"))
    for failure in report.failures:
        print(visible(failure))
    print("parity: passed" if report.passed else "parity: FAILED")


def case_table(case: Case) -> Table:
    """One model in one dtype: every implementation's errors against the oracle."""
    texts = ", ".join(f"{name} {count}" for name, count in case.texts.items())
    table = _table(f"{case.model} {case.dtype}, {case.positions} positions ({texts})")
    # Only names may fold: a number that is cut short would be another number.
    table.add_column("against float64", min_width=len("transformers eager"), overflow="fold")
    _add_figures(table, "relRMS", "max", "KL mean", "KL max", "top-1", "NLL", "bits", "")
    for row in case.rows:
        table.add_row(
            Text(row.who),
            number(row.relative, 2),
            number(row.max),
            number(row.kl_mean),
            number(row.kl_max),
            f"{row.top1:.1%}",
            "" if math.isnan(row.nll_change) else f"{row.nll_change:+.0e}",
            BITS[row.same_bits],
            "" if row.reference else verdict(row),
        )
    return table


def continuations_table(parts: list[Continuations]) -> Table:
    """Ids beside transformers'."""
    table = _table("Ids beside transformers' generate")
    table.add_column("model")
    table.add_column("what", no_wrap=True)
    _add_figures(table, "calls", "ids", "near-ties", "")
    for part in parts:
        result = "FAILED" if part.failures else "near-ties" if part.flips else "the same"
        counts = (str(count) for count in (part.calls, part.ids, len(part.flips)))
        table.add_row(Text(f"{part.model} {part.dtype}"), part.what, *counts, result)
    return table


def gradients_table(parts: list[Gradients]) -> Table:
    """The gradients of every weight, and the one that is nearest to its limit."""
    table = _table("Gradients of the loss")
    table.add_column("model")
    _add_figures(table, "weights", "same bits", "relRMS", "R")
    table.add_column("of")
    table.add_column("", no_wrap=True)
    for part in parts:
        worst = part.worst
        counts = (str(part.weights), str(part.same_bits), number(worst.relative), number(worst.reference))
        table.add_row(Text(f"{part.model} {part.dtype}"), *counts, worst.weight, verdict(part))
    return table


def mutations_table(trials: list[Trial]) -> Table:
    """What the criteria and the search made of each planted bug."""
    right = sum(trial.right for trial in trials)
    table = _table(f"Planted bugs: {right} of {len(trials)} judged rightly")
    table.add_column("bug", max_width=19)
    _add_figures(table, "R")
    table.add_column("gate", no_wrap=True)
    table.add_column("first divergence: suspect")
    for trial in trials:
        gate = ("passes" if trial.passed else "fails") + ("" if trial.right else ", WRONG")
        found = f"{trial.address}: {trial.suspect}" if trial.address else "none"
        table.add_row(trial.name, f"{trial.score:.3g}", gate, Text(found))
    return table


def search_lines(search: Search) -> str:
    """Where one implementation diverges first."""
    title = f"{search.model} {search.dtype}, {search.who}, on {search.text}"
    return f"{title}: {search.found or 'no divergence'}"


def verdict(part: Row | Gradients) -> str:
    """In a word."""
    return "FAILED" if part.failures else "passed"


def number(value: float, digits: int = 1) -> str:
    """A number in few characters."""
    return "not finite" if not math.isfinite(value) else "0" if value == 0 else f"{value:.{digits}e}"


def _table(title: str) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        header_style="underline",
        box=None,
        padding=(0, 1, 0, 0),
    )


def _add_figures(table: Table, *heads: str) -> None:
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
