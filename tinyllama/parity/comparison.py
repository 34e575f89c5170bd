"""Logits beside the truth: transformers' and ours in one table, and any two callables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyllama.attention import Kernel
from tinyllama.model import Llama
from tinyllama.parity.divergence import Run
from tinyllama.parity.measure import Difference, Limits, Verdict, broken, difference, judge, limits
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import Right, config_fields, reference_model
from tinyllama.parity.trace import Trace, our_trace, reference_trace, stages

REFERENCES = ("eager", "sdpa")


@dataclass(frozen=True)
class Row:
    """One implementation's figures.

    Attributes:
        who: whose logits, with which attention.
        reference: whether it is one of those that are right, by which the others are judged.
        measured: their difference from the truth.
        by_layer: relRMS at each of the model's stages, from the embedding to the logits; NaN where a stage
            was never computed, or in another shape.
        same_bits: whether every logit equals that of the reference with the same attention; None where there
            is no such partner.
        failures: every criterion that is broken; none for a reference.
    """

    who: str
    reference: bool
    measured: Difference
    by_layer: tuple[float, ...]
    same_bits: bool | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One model in one dtype: every implementation on the same texts.

    Attributes:
        positions: how many of each text, by name.
        rows: the references first.
        limits: what the other rows had to keep to.
    """

    positions: dict[str, int]
    rows: tuple[Row, ...]
    limits: Limits

    @property
    def failures(self) -> list[str]:
        """Every broken criterion, with whose it is."""
        return [f"{row.who}: {failure}" for row in self.rows for failure in row.failures]


def kernel_run(model: Llama, kernel: Kernel) -> Run:
    """Our model with that kernel in every layer."""

    def run(ids: Sequence[int], addresses: Iterable[str]) -> Trace:
        model.set_attention(kernel)
        return our_trace(model, ids, addresses)

    return run


def reference_run(model: Llama, attention: str) -> Run:
    """Run transformers over the weights of ours, with "eager" or "sdpa"."""
    reference = reference_model(model, attention)
    return lambda ids, addresses: reference_trace(reference, ids, addresses)


@torch.no_grad()
def truths(right: Right, texts: Mapping[str, Sequence[int]]) -> dict[str, Trace]:
    """The oracle's values at every stage, for each text; logits are at "lm_head"."""
    config, weights = config_fields(right.config), right.state_dict()
    traces: dict[str, Trace] = {}
    for name, ids in texts.items():
        traces[name] = dict.fromkeys(stages(right.config.num_hidden_layers))
        oracle_logits(config, weights, ids, traces[name])
    return traces


@torch.no_grad()
def compare_runs(
    references: Mapping[str, Run],
    candidates: Mapping[str, Run],
    texts: Mapping[str, Sequence[int]],
    truth: Mapping[str, Trace],
    dtype: torch.dtype,
    partners: Mapping[str, str] | None = None,
    done: Callable[[str], object] = lambda what: None,
    limit: Limits | None = None,
) -> Case:
    """Judge logits against the truth, by the references' own error.

    Args:
        references: right implementations, by name.
        candidates: those in question, by name.
        texts: ids by name.
        truth: for each text the float64 values at every stage.
        dtype: the one under test.
        partners: for a candidate the reference that it is compared with bit by bit too.
        done: told of each pass that begins.
        limit: what the candidates have to keep to; None follows from dtype and references.
    """
    partners = partners or {}
    tallies = {who: _Tally() for who in [*references, *candidates]}
    for text, ids in texts.items():
        logits: dict[str, Tensor] = {}
        for who, run in (references | candidates).items():  # type: ignore[operator]
            done(f"{text}: {who}")
            values = run(ids, list(truth[text]))
            tallies[who].add(values, truth[text], ids)
            if who in references:
                logits[who] = _logits(values)
            elif who in partners:
                tallies[who].same_bits.append(torch.equal(_logits(values), logits[partners[who]]))
    measured = {who: Difference.joined(tally.parts) for who, tally in tallies.items()}
    limit = limit or limits([measured[who] for who in references], dtype)
    rows = [
        Row(
            who=who,
            reference=who in references,
            measured=measured[who],
            by_layer=tally.by_layer(),
            same_bits=all(tally.same_bits) if tally.same_bits else None,
            failures=() if who in references else broken(measured[who], limit),
        )
        for who, tally in tallies.items()
    ]
    return Case({text: len(ids) for text, ids in texts.items()}, tuple(rows), limit)


def _logits(values: Trace) -> Tensor:
    logits = values["lm_head"]
    assert logits is not None, "the run gave no logits"
    return logits


class _Tally:
    """What one implementation's passes add up to."""

    def __init__(self) -> None:
        self.parts: list[Difference] = []
        self.same_bits: list[bool] = []
        self.squares: dict[str, list[float]] = {}  # address -> of the error, of the truth

    def add(self, values: Trace, truth: Trace, ids: Sequence[int]) -> None:
        """One text's values."""
        for address, right in truth.items():
            value = values.get(address)
            if address == "lm_head" or right is None:
                continue
            sums = self.squares.setdefault(address, [0.0, 0.0])
            if value is None or value.shape != right.shape:
                sums[0] = math.nan
            else:
                sums[0] += (value - right).square().sum().item()
            sums[1] += right.square().sum().item()
        self.parts.append(difference(_logits(values), _logits(truth), ids))

    def by_layer(self) -> tuple[float, ...]:
        """The relRMS at every stage; the logits' last."""
        errors = [(error / size) ** 0.5 for error, size in self.squares.values()]
        return (*errors, Difference.joined(self.parts).relative)


@dataclass(frozen=True)
class Comparison:
    """Two implementations' logits on one text, judged.

    Attributes:
        mine: the difference from the truth of the one in question.
        reference: that of the other; None where it is the truth itself.
        same_bits: whether all their logits are equal.
        verdict: whether mine passes.
    """

    mine: Difference
    reference: Difference | None
    same_bits: bool
    verdict: Verdict

    def __str__(self) -> str:
        """In a few lines."""
        rows = {"mine": self.mine} | ({} if self.reference is None else {"reference": self.reference})
        lines = [
            f"{who:<10} relRMS {d.relative:.2e}  max {d.max:.2e}  KL {d.kl_mean:.1e}  top-1 {d.top1:.1%}"
            for who, d in rows.items()
        ]
        lines.append(f"the bits are {'the same' if self.same_bits else 'others'}")
        lines += self.verdict.failures
        return "\n".join([*lines, "passed" if self.verdict.passed else "FAILED"])


@torch.no_grad()
def compare(
    mine: Callable[[Tensor], Any],
    reference: Callable[[Tensor], Any],
    ids: Sequence[int],
    truth: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Judge any implementation's logits by another's: your own Llama by transformers', say.

    Args:
        mine: what is in question: takes ids (1, T), gives logits (1, T, V) or (T, V), or an object that has
            them as `.logits`.
        reference: what is known to be right.
        ids: one text, T ids.
        truth: (T, V) in float64, such as `oracle_logits` gives; None takes the reference's logits for the
            truth, which leaves only the absolute limits to judge by.
        dtype: in which both compute; the criteria depend on it.

    Raises:
        ValueError: the logits' shapes differ.
    """
    batch = torch.tensor([list(ids)])
    ours, theirs = (_rows(one(batch)) for one in (mine, reference))
    right = theirs.to(torch.float64) if truth is None else truth.cpu()
    for who, logits in (("mine", ours), ("reference", theirs)):
        if logits.shape != right.shape:
            raise ValueError(
                f"{who}: expected logits of shape {tuple(right.shape)}, got {tuple(logits.shape)}"
            )
    measured = difference(ours, right, ids)
    known = None if truth is None else difference(theirs, right, ids)
    verdict = judge(measured, [] if known is None else [known], dtype)
    return Comparison(measured, known, torch.equal(ours, theirs), verdict)


def _rows(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return (logits[0] if logits.dim() == 3 else logits).cpu()
