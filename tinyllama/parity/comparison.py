"""Logits beside the oracle's: transformers' and ours in one table, and any two callables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyllama.attention import Kernel
from tinyllama.model import Llama
from tinyllama.pages import cell
from tinyllama.parity.divergence import Run
from tinyllama.parity.measure import Difference, Limits, Verdict, broken, difference, judge, limits
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import Right, config_fields, reference_model
from tinyllama.parity.report import BIN, Case, Flip, Row
from tinyllama.parity.trace import Trace, our_trace, reference_trace, stages

REFERENCES = ("eager", "sdpa")
# What a row tells of a `Difference`.
SUMMARIES = ("relative", "rms", "mean", "max", "kl_mean", "kl_p99", "kl_max", "top1", "nll_change")


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
    model: str = "",
    note: str = "",
) -> Case:
    """Judge logits against the oracle's, by the references' own error.

    Args:
        references: right implementations, by name.
        candidates: those in question, by name.
        texts: ids by name.
        truth: for each text the float64 values at every stage.
        dtype: the one under test.
        partners: for a candidate the other, earlier in the order of the names, that it is compared with bit
            by bit.
        done: told of each pass that begins.
        limit: what the candidates have to keep to; None follows from dtype and references.
        model: the case's name for the model.
        note: what is not judged, and why.
    """
    partners = partners or {}
    runs = {**references, **candidates}
    parts: dict[str, list[Difference]] = {who: [] for who in runs}
    squares: dict[str, list[Tensor]] = {who: [] for who in runs}
    same_bits: dict[str, list[bool]] = {who: [] for who in runs}
    for text, ids in texts.items():
        known: dict[str, Tensor] = {}
        for who, run in runs.items():
            done(f"{text}: {who}")
            values = run(ids, list(truth[text]))
            logits = _logits(values)
            parts[who].append(difference(logits, _logits(truth[text]), ids))
            squares[who].append(_squares(values, truth[text]))
            if who in partners.values():
                known[who] = logits
            if who in partners:
                same_bits[who].append(torch.equal(logits, known[partners[who]]))
    measured = {who: Difference.joined(some) for who, some in parts.items()}
    limit = limit or limits([measured[who] for who in references], dtype)
    counts = {text: len(ids) for text, ids in texts.items()}
    rows = [
        Row(
            who=who,
            reference=who in references,
            **{name: getattr(one, name) for name in SUMMARIES},
            flips=list(_flips(one, counts)),
            same_bits=all(same_bits[who]) if same_bits[who] else None,
            by_layer=[*_relative(squares[who]), one.relative],
            by_position=_by_position(one, counts),
            failures=[] if who in references else list(broken(one, limit)),
        )
        for who, one in measured.items()
    ]
    return Case(model, str(dtype).removeprefix("torch."), counts, note, limit, rows)


def _logits(values: Trace) -> Tensor:
    logits = values["lm_head"]
    assert logits is not None, "the run gave no logits"
    return logits


def _squares(values: Trace, truth: Trace) -> Tensor:
    """At each stage before the logits, the squared error and the squared truth, summed: (stages, 2)."""
    sums = []
    for address, right in truth.items():
        value = values.get(address)
        if address != "lm_head" and right is not None:
            same_shape = value is not None and value.shape == right.shape
            error = (value - right).square().sum().item() if same_shape else math.nan  # type: ignore[operator]
            sums.append([error, right.square().sum().item()])
    return torch.tensor(sums, dtype=torch.float64)


def _relative(squares: Sequence[Tensor]) -> list[float]:
    """The relRMS at each stage, over all texts."""
    errors, sizes = torch.stack(list(squares)).sum(dim=0).T
    return (errors / sizes).sqrt().tolist()


def _flips(measured: Difference, counts: Mapping[str, int]) -> Iterator[Flip]:
    places = [(text, position) for text, count in counts.items() for position in range(count)]
    for index in measured.flipped.nonzero().flatten().tolist():
        figures = (one[index].item() for one in (measured.expected, measured.chosen, measured.margin))
        yield Flip(*places[index], *figures)


def _by_position(measured: Difference, counts: Mapping[str, int]) -> dict[str, list[float]]:
    errors, sizes = (one.split(list(counts.values())) for one in (measured.squared, measured.truth_squared))
    return {
        text: [
            (squared.mean() / size.mean()).sqrt().item()
            for squared, size in zip(error.split(BIN), whole.split(BIN), strict=True)
        ]
        for text, error, whole in zip(counts, errors, sizes, strict=True)
    }


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

    def __repr__(self) -> str:
        """In a few lines."""
        lines = [
            f"{who:<10} relRMS {relative}  max {largest}  KL {kl}  top-1 {top1}"
            for who, relative, largest, kl, top1 in self._rows()
        ]
        return "\n".join([*lines, *self._findings()])

    def _repr_html_(self) -> str:
        """A table, for a notebook."""
        columns = ("against the truth", "#relRMS", "#max", "#KL", "#top-1")
        return cell.table("; ".join(reversed(self._findings())), columns, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        """The figures of each implementation, written out."""
        measured = {"mine": self.mine} | ({} if self.reference is None else {"reference": self.reference})
        return [
            (who, f"{d.relative:.2e}", f"{d.max:.2e}", f"{d.kl_mean:.1e}", f"{d.top1:.1%}")
            for who, d in measured.items()
        ]

    def _findings(self) -> list[str]:
        """Whether the bits are the same, every criterion that is broken, and the verdict."""
        bits = "the bits are the same" if self.same_bits else "the bits differ"
        return [bits, *self.verdict.failures, "passed" if self.verdict.passed else "FAILED"]


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
        reference: what is known to be right; called and answering like `mine`.
        ids: one text, T ids.
        truth: (T, V) in float64, such as `oracle_logits` gives; None takes the reference's logits for the
            truth, and only the dtype's fixed limit is left to judge by.
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
