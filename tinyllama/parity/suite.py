"""All that `make parity` judges, collected into one dictionary of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from tinyllama.attention import Kernel
from tinyllama.device import machine
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity import report
from tinyllama.parity.comparison import REFERENCES, compare_runs, kernel_run, reference_run, truths
from tinyllama.parity.continuations import SETTINGS, compare_continuations
from tinyllama.parity.divergence import Divergence, Run, bisect
from tinyllama.parity.fast import (
    Dequantised,
    dequantised_reference_run,
    divisible,
    fast_layers,
    fast_run,
    products,
)
from tinyllama.parity.fixture import LENGTH, fixture, random_ids
from tinyllama.parity.gradients import compare_gradients
from tinyllama.parity.measure import INT8_LIMITS, Limits
from tinyllama.parity.mutations import try_mutations
from tinyllama.parity.notebook import notebook_failures
from tinyllama.parity.reference import Right
from tinyllama.parity.subjects import Checkpoint, Extent, Subject, Texts
from tinyllama.parity.trace import Trace, stages

# These share their weights' values, and so one truth.
WIDE = ("float64", "float32")
# Tokens in which a divergence is looked for first: most show on few.
SEARCHED = 128
GRADIENT_POSITIONS = 64
# Of random weights rounded to 8 bits: the whole oracle once more, on weights that are larger than most.
RANDOM_INT8_POSITIONS = 64
RANDOM_NOTE = "Random weights: what rounding them does to the predictions says nothing, and is not judged."
INDIVISIBLE_NOTE = "8-bit weights are not judged: they need rows that are a multiple of 64."


class Suite:
    """Judges one thing after another.

    Attributes:
        figures: the results so far; see `tinyllama.parity.report`.
    """

    def __init__(self, search: bool = False, done: Callable[[str], object] = lambda what: None) -> None:
        """Tell `done` of each step; look for divergences where logits fail, or (`search`) everywhere."""
        self._search, self._done = search, done
        self.figures: report.Figures = {"machine": machine(), **{name: [] for name in report.SECTIONS}}

    def judge(self, subject: Subject, kernels: Mapping[str, Kernel], extent: Extent) -> None:
        """Judge our kernels by transformers; with our own two, the fast layers and generated ids as well.

        Args:
            subject: the model.
            kernels: by name; one named like transformers' own is compared with it bit by bit.
            extent: how much of it.
        """
        texts = subject.texts(extent)
        truth: dict[str, Trace] = {}
        for dtype in extent.dtypes:
            self._done(f"{subject.name} {dtype}")
            model = subject.model(dtype)
            if dtype not in WIDE or not truth:
                truth = truths(model, texts)
            self._compare_with_transformers(subject.name, dtype, model, REFERENCES, kernels, texts, truth)
            if dtype == "float32" and kernels == KERNELS:
                if divisible(model):
                    self._judge_int8(subject, model, texts, truth)
                self._judge_more(subject, model, extent)

    def judge_checkpoint(
        self, subject: Subject, other: Subject, kernels: Mapping[str, Kernel], extent: Extent
    ) -> None:
        """Judge one checkpoint, by our kernels, against what another one should compute.

        Raises:
            InputError: their vocabularies differ.
        """
        for dtype in extent.dtypes:
            self._done(f"{subject.name} {dtype}")
            right, model = other.model(dtype), subject.model(dtype)
            if model.config.vocab_size != right.config.vocab_size:
                raise InputError(
                    f"{subject.name}: expected {other.name}'s vocabulary of {right.config.vocab_size} ids, "
                    f"got {model.config.vocab_size}; compare models that share a tokenizer"
                )
            texts = other.texts(extent)
            self._compare(
                f"{subject.name} against {other.name}",
                dtype,
                {f"transformers {name} ({other.name})": reference_run(right, name) for name in REFERENCES},
                {f"tinyllama {name}": kernel_run(model, kernel) for name, kernel in kernels.items()},
                texts,
                truths(right, texts),
                {},
                right,
            )

    def judge_kernel(
        self, subject: Subject, names: tuple[str, str], kernel: Kernel, other: Kernel, extent: Extent
    ) -> None:
        """Judge one kernel of ours against another, whose float64 run is the truth.

        Args:
            subject: the model.
            names: of the two kernels.
            kernel: the one in question.
            other: the one that is right.
            extent: how much of it.
        """
        for dtype in extent.dtypes:
            self._done(f"{subject.name} {dtype}")
            model = subject.model(dtype)
            true = kernel_run(deepcopy(model).to(torch.float64), other)
            texts, at = subject.texts(extent), stages(model.config.num_hidden_layers)
            self._compare(
                f"{subject.name}, {names[0]} against {names[1]}",
                dtype,
                {f"reference: {names[1]}": kernel_run(model, other)},
                {names[0]: kernel_run(model, kernel)},
                texts,
                {name: true(ids, at) for name, ids in texts.items()},
                {names[0]: f"reference: {names[1]}"},
                model,
                true,
            )

    def judge_fixture(self) -> None:
        """The proof that all this can fail: every planted bug is found; and the fixture's gradients."""
        self._done("planted bugs")
        self.figures["mutations"] = [report.trial_figures(trial) for trial in try_mutations()]
        model = fixture()
        self._gradients("unit-gain fixture", model, random_ids(LENGTH, model.config.vocab_size))

    def _judge_int8(self, subject: Subject, model: Llama, texts: Texts, truth: Mapping[str, Trace]) -> None:
        """8-bit weights: the computation with them, and what rounding them does to a trained model."""
        name, who = f"{subject.name}, int8 weights", f"tinyllama int8{products(model, 'int8')}"
        self._done(f"{name} float32, rounding")
        layers = fast_layers(model, "int8")
        run, right = fast_run(model, layers), Dequantised(model, layers)
        references = {
            f"transformers {one}": dequantised_reference_run(model, layers, one) for one in REFERENCES
        }
        note = "" if subject.trained else RANDOM_NOTE
        if subject.trained:
            run = _remembered(run)
        else:
            texts = {text: ids[:RANDOM_INT8_POSITIONS] for text, ids in texts.items()}
        true = truths(right, texts)
        self._compare(name, "float32", references, {who: run}, texts, true, {}, right, note=note)
        if subject.trained:
            name += " against the full ones"
            # Not searched: every matrix diverges, by its rounding.
            self._compare(name, "float32", {}, {who: run}, texts, truth, {}, None, limit=INT8_LIMITS)

    def _judge_more(self, subject: Subject, model: Llama, extent: Extent) -> None:
        """What is judged in float32 only: a long text, generated ids, gradients."""
        if ids := subject.long_text(extent):
            # By one kernel: the textbook's scores of a long text take a minute.
            name, texts, long = f"{subject.name}, long text", {"english": ids}, {"sdpa": KERNELS["sdpa"]}
            self._compare_with_transformers(name, "float32", model, long, long, texts, truths(model, texts))
        self._generate(subject, model, extent)
        if extent.gradients:
            (ids, *_) = subject.texts(extent).values()
            self._gradients(subject.name, model, ids)
        if isinstance(subject, Checkpoint) and subject.official:
            self._done(f"{subject.name}, the notebook's texts")
            failures = notebook_failures(model, subject.tokenizer)
            self.figures["notebook"].append({"model": subject.name, "dtype": "float32", "failures": failures})

    def _compare_with_transformers(
        self,
        name: str,
        dtype: str,
        model: Llama,
        references: Iterable[str],
        kernels: Mapping[str, Kernel],
        texts: Texts,
        truth: Mapping[str, Trace],
    ) -> None:
        candidates = {f"tinyllama {one}": kernel_run(model, kernel) for one, kernel in kernels.items()}
        if kernels == KERNELS and dtype != "float64":
            candidates[f"tinyllama stored{products(model, 'stored')}"] = fast_run(
                model, fast_layers(model, "stored")
            )
        indivisible = kernels == KERNELS and dtype == "float32" and not divisible(model)
        self._compare(
            name,
            dtype,
            {f"transformers {one}": reference_run(model, one) for one in references},
            candidates,
            texts,
            truth,
            {f"tinyllama {one}": f"transformers {one}" for one in references},
            model,
            note=INDIVISIBLE_NOTE if indivisible else "",
        )

    def _compare(
        self,
        name: str,
        dtype: str,
        references: dict[str, Run],
        candidates: dict[str, Run],
        texts: Texts,
        truth: Mapping[str, Trace],
        partners: Mapping[str, str],
        right: Right | None,
        true: Run | None = None,
        limit: Limits | None = None,
        note: str = "",
    ) -> None:
        """One case; without a `right` model, nothing is searched."""
        case = compare_runs(
            references,
            candidates,
            texts,
            truth,
            getattr(torch, dtype),
            partners,
            lambda what: self._done(f"{name} {dtype}, {what}"),
            limit,
        )
        self.figures["cases"].append(report.case_figures(name, dtype, case, note))
        for row in case.rows:
            if right and (row.failures or (self._search and row.who in candidates)):
                self._done(f"{name} {dtype}, {row.who}: where does it diverge?")
                text, found = _first_divergence(
                    candidates[row.who], right, texts, list(references.values()), true
                )
                self.figures["searches"].append(report.divergence_figures(name, dtype, row.who, text, found))

    def _generate(self, subject: Subject, model: Llama, extent: Extent) -> None:
        """Greedy in a batch and alone, sampled alone and in a batch."""
        prompts = subject.prompts()[: extent.prompts]

        def compare(what: str, calls: Sequence[tuple[list[list[int]], dict[str, Any]]], count: int) -> None:
            self._done(f"{subject.name}, {what}")
            rows = [compare_continuations(model, batch, count, **how) for batch, how in calls]
            self.figures["continuations"].append(
                report.continuation_figures(subject.name, "float32", what, rows)
            )

        many = f"batch of {len(prompts)}"
        compare(f"greedy, {many}", [(prompts, {"attention": "eager"})], extent.greedy_ids)
        compare("greedy, alone", [([prompt], {}) for prompt in prompts], extent.greedy_ids)
        seeds = range(extent.seeds)
        alone = [
            ([prompts[seed % len(prompts)]], {"seed": seed, **how}) for how in SETTINGS for seed in seeds
        ]
        compare("sampled, alone", alone, extent.sampled_ids)
        # Without a repetition penalty: transformers also applies it to the padding.
        penalty_free = [how for how in SETTINGS if "repetition_penalty" not in how]
        batched = [
            (prompts, {"seed": seed, "attention": "eager", **how}) for seed, how in enumerate(penalty_free)
        ]
        compare(f"sampled, {many}", batched, extent.sampled_ids)

    def _gradients(self, name: str, model: Llama, ids: list[int]) -> None:
        self._done(f"{name}, gradients")
        ids = ids[:GRADIENT_POSITIONS]
        rows = compare_gradients(model, ids)
        self.figures["gradients"].append(report.gradient_figures(name, "float32", len(ids), rows))


def _remembered(run: Run) -> Run:
    """The same, each text once: two cases read its values."""
    known: dict[tuple[tuple[int, ...], tuple[str, ...]], Trace] = {}

    def once(ids: Sequence[int], addresses: Iterable[str]) -> Trace:
        key = (tuple(ids), tuple(addresses))
        if key not in known:
            known[key] = run(ids, addresses)
        return known[key]

    return once


@torch.no_grad()
def _first_divergence(
    run: Run, right: Right, texts: Texts, references: list[Run], true: Run | None
) -> tuple[str, Divergence | None]:
    """Search the texts' beginnings, then whole texts; returns what was searched last, and what was found."""
    long = {name: ids for name, ids in texts.items() if len(ids) > SEARCHED}
    searched = [
        (f"{name}, first {SEARCHED} tokens" if name in long else name, ids[:SEARCHED])
        for name, ids in texts.items()
    ]
    searched += long.items()
    for name, ids in searched:
        found = bisect(run, right, ids, references, true)
        if found is not None:
            return name, found
    return "all texts", None
