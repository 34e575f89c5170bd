"""All that `make parity` found out: what the JSON, the tables at a terminal and the page show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tinyllama.parity.continuations import Continuations
from tinyllama.parity.divergence import Divergence
from tinyllama.parity.gradients import Gradients
from tinyllama.parity.measure import Limits
from tinyllama.parity.mutations import Trial
from tinyllama.parity.notebook import Notebook

# Positions that share one point of a curve.
BIN = 32


@dataclass(frozen=True)
class Flip:
    """A position whose most likely token is not the oracle's; `margin` is the oracle's between the two."""

    text: str
    position: int
    expected: int
    chosen: int
    margin: float


@dataclass(frozen=True)
class Row:
    """One implementation's errors against the oracle.

    Attributes:
        who: whose logits, with which attention.
        reference: whether it is one of those that are right, by which the others are judged.
        relative: relRMS of the logits; see `Difference`, as for the next eight.
        flips: where the most likely token is not the oracle's.
        same_bits: whether every logit equals that of the reference with the same attention, or on several
            ranks that of one process; None where there is no such one.
        by_layer: relRMS at each of the model's stages, from the embedding to the logits; NaN where a stage
            was never computed, or has another shape.
        by_position: relRMS of each group of `BIN` positions, by text.
        failures: every criterion that is broken; none for a reference.
    """

    who: str
    reference: bool
    relative: float
    rms: float
    mean: float
    max: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    nll_change: float
    flips: list[Flip]
    same_bits: bool | None
    by_layer: list[float]
    by_position: dict[str, list[float]]
    failures: list[str]


@dataclass(frozen=True)
class Case:
    """One model in one dtype: every implementation on the same texts.

    Attributes:
        model: its name.
        dtype: of its weights and activations.
        texts: how many positions of each text, by name.
        note: what was not judged, and why.
        limits: what the rows have to keep to.
        rows: the references first.
    """

    model: str
    dtype: str
    texts: dict[str, int]
    note: str
    limits: Limits
    rows: list[Row]

    @property
    def positions(self) -> int:
        """Of all texts together."""
        return sum(self.texts.values())

    def worst_reference(self) -> float | None:
        """R: the largest relRMS of the references; None where none is finite."""
        errors = [row.relative for row in self.rows if row.reference]
        return max((error for error in errors if math.isfinite(error)), default=None)

    def times(self, error: float) -> float | None:
        """An error in units of R; None without R."""
        worst = self.worst_reference()
        return error / worst if worst else None

    def limit_times(self) -> float | None:
        """The limit on relRMS in units of R; None where the limit does not depend on R."""
        return None if self.dtype == "float64" else self.times(self.limits.relative)

    @property
    def failures(self) -> list[str]:
        """Every broken criterion, with whose it is."""
        return [f"{row.who}: {failure}" for row in self.rows for failure in row.failures]


@dataclass(frozen=True)
class Search:
    """Where one implementation diverges first.

    Attributes:
        model: its name.
        dtype: of its weights and activations.
        who: the implementation.
        text: what was searched last.
        found: the first divergence; None where there is none.
    """

    model: str
    dtype: str
    who: str
    text: str
    found: Divergence | None


@dataclass
class Report:
    """Everything that was judged, in the order in which it was.

    Attributes:
        machine: what it was measured on, and when.
        cases: logits.
        continuations: generated ids.
        gradients: of every weight.
        notebook: the seed notebook's texts, generated again.
        mutations: planted bugs.
        searches: for the first divergence, where logits failed or the user asked for it.
    """

    machine: dict[str, str | int | None] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    continuations: list[Continuations] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    notebook: list[Notebook] = field(default_factory=list)
    mutations: list[Trial] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Every failure in one line."""
        parts: list[Case | Continuations | Gradients | Notebook]
        parts = [*self.cases, *self.continuations, *self.gradients, *self.notebook]
        lines = [f"{part.model} {part.dtype}: {failure}" for part in parts for failure in part.failures]
        return lines + [
            f"mutation {trial.name}: judged wrongly" for trial in self.mutations if not trial.right
        ]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures
