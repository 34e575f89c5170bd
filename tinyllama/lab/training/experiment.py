"""What training several attentions from scratch has shown: the figures, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tinyllama.lab.training.findings import Finding
from tinyllama.lab.training.from_scratch import Recipe, Run
from tinyllama.pages.cell import frame
from tinyllama.progress import escape, printed


@dataclass(frozen=True)
class Experiment:
    """Several attentions trained alike; `dataclasses.asdict` gives plain JSON.

    Attributes:
        machine: what it ran on.
        recipe: how each was trained.
        model: layers, sizes and parameters of each model.
        text_tokens: in the text that is learnt from.
        findings: each attention beside the first.
        runs: all of them, by attention and then by seed.
        peer: transformers' tokens a second with the same weights, in turn with the others; None: not timed.
    """

    machine: dict[str, Any]
    recipe: Recipe
    model: dict[str, int]
    text_tokens: int
    findings: list[Finding]
    runs: list[Run]
    peer: float | None = None

    def of(self, kernel: str) -> list[Run]:
        """The runs of an attention, by seed."""
        return [run for run in self.runs if run.kernel == kernel]

    @property
    def kernels(self) -> list[str]:
        """Their names; the first is what the others are compared with."""
        return [one.kernel for one in self.findings]

    def __repr__(self) -> str:
        """The table that train.py prints."""
        return printed(partial(show, experiment=self))

    def _repr_html_(self) -> str:
        """The page that train.py writes, for a notebook."""
        from tinyllama.lab.training.page import page  # here, because page.py imports this file

        return frame("tinyllama training", page(self))


def show(console: Console, experiment: Experiment) -> None:
    """Print the held-out loss on the way, and a verdict on each attention."""
    recipe, by_kernel = experiment.recipe, [experiment.of(kernel) for kernel in experiment.kernels]
    table = Table("tokens read", *(Column(escape(name), justify="right") for name in experiment.kernels))

    def row(name: str, figure: Callable[[Sequence[Run]], str]) -> None:
        table.add_row(name, *map(figure, by_kernel))

    for look, (steps, _) in enumerate(experiment.runs[0].held_out):

        def mean(runs: Sequence[Run], look: int = look) -> str:
            return f"{statistics.mean(run.held_out[look][1] for run in runs):.3f}"

        row(f"{steps * recipe.batch * recipe.length:,}", mean)
    if len(by_kernel[0]) > 1:
        row("± over seeds", lambda runs: f"{statistics.stdev(run.held_out[-1][1] for run in runs):.3f}")
    table.add_row("tokens/s", *(f"{one.tokens_per_second:,.0f}" for one in experiment.findings))
    table.add_row("backward, MB", *(f"{one.saved_bytes / 1e6:,.1f}" for one in experiment.findings))
    console.print(table)
    console.print("Loss of held-out text, in nats a token; backward: what a step keeps for that pass.")
    first, *others = experiment.findings
    if experiment.peer is not None:
        ratio = first.tokens_per_second / experiment.peer
        console.print(f"transformers: {experiment.peer:,.0f} tokens/s; {escape(first.kernel)} {ratio:.2f}×")
    if others:
        console.print(Text(f"Beside {escape(first.kernel)}:"))
    for one in others:
        console.print(Text(f"  {escape(str(one))}"))
