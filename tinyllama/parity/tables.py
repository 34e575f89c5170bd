"""A report at a terminal."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from tinyllama.parity.continuations import Continuations
from tinyllama.parity.gradients import Gradients
from tinyllama.parity.mutations import Trial
from tinyllama.parity.report import Case, Report
from tinyllama.progress import TableConsole, escape

BITS = {None: "", True: "same", False: "differ"}


def show(report: Report) -> None:
    """Print every result, the verdict last."""
    console = TableConsole()
    tables = [case_table(case) for case in report.cases]
    tables += [continuations_table(report.continuations)] if report.continuations else []
    tables += [gradients_table(report.gradients)] if report.gradients else []
    tables += [mutations_table(report.mutations)] if report.mutations else []
    for table in tables:
        console.print(table, "")
    for search in report.searches:
        title = f"{search.model} {search.dtype}, {search.who}, on {search.text}"
        console.print(Text(f"{title}: {search.found or 'no divergence'}\n"))
    for failure in report.failures:
        print(escape(failure))
    print("parity: passed" if report.passed else "parity: FAILED")


def case_table(case: Case) -> Table:
    """One model in one dtype: every implementation's errors against the oracle."""
    texts = ", ".join(f"{name} {count}" for name, count in case.texts.items())
    title = f"{case.model} {case.dtype}, {case.positions} positions ({texts})"
    figures = ("#relRMS", "#max", "#KL mean", "#KL max", "#top-1", "#NLL", "#bits", "#")
    table = _table(title, "against float64", *figures)
    # A name may fold; a number that is cut short would be another number.
    table.columns[0].min_width = len("transformers eager")
    table.caption = Text(case.note) if case.note else None
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
            "" if row.reference else _verdict(row.failures),
        )
    return table


def continuations_table(parts: list[Continuations]) -> Table:
    """Ids beside transformers'."""
    table = _table("Ids beside transformers' generate", "model", "what", "#calls", "#ids", "#near-ties", "#")
    for part in parts:
        counts = (str(count) for count in (part.calls, part.ids, len(part.flips)))
        result = _verdict(part.failures, "near-ties" if part.flips else "the same")
        table.add_row(Text(f"{part.model} {part.dtype}"), part.what, *counts, result)
    return table


def gradients_table(parts: list[Gradients]) -> Table:
    """The gradients of every weight, and the one that is nearest to its limit."""
    table = _table("Gradients of the loss", "model", "#weights", "#same bits", "#relRMS", "#R", "of", "")
    for part in parts:
        worst = part.worst
        counts = (str(part.weights), str(part.same_bits), number(worst.relative), number(worst.reference))
        table.add_row(Text(f"{part.model} {part.dtype}"), *counts, worst.weight, _verdict(part.failures))
    return table


def mutations_table(trials: list[Trial]) -> Table:
    """What the criteria and the search made of each planted bug."""
    right = sum(trial.right for trial in trials)
    title = f"Planted bugs: {right} of {len(trials)} judged rightly"
    table = _table(title, "bug", "#R", "#gate", "first divergence: suspect")
    table.columns[0].max_width = 19
    for trial in trials:
        gate = ("passes" if trial.passed else "fails") + ("" if trial.right else ", WRONG")
        found = f"{trial.address}: {trial.suspect}" if trial.address else "none"
        table.add_row(trial.name, f"{trial.score:.3g}", gate, Text(found))
    return table


def number(value: float, digits: int = 1) -> str:
    """A number in few characters."""
    return "not finite" if not math.isfinite(value) else "0" if value == 0 else f"{value:.{digits}e}"


def _verdict(failures: list[str], otherwise: str = "passed") -> str:
    return "FAILED" if failures else otherwise


def _table(title: str, *columns: str) -> Table:
    """A table without rows; a column of figures, which never folds, is named with a # in front."""
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        header_style="underline",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        figure = name.startswith("#")
        table.add_column(
            name.lstrip("#"), justify="right" if figure else "left", no_wrap=figure, overflow="fold"
        )
    return table
