"""All that `make parity` judges, one thing after another, collected into a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch

from tinyllama.attention import Kernel
from tinyllama.checkpoints.storage import HAS_FAST
from tinyllama.device import machine
from tinyllama.errors import InputError
from tinyllama.generation import generate
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity.comparison import REFERENCES, compare_runs, kernel_run, reference_run, truths
from tinyllama.parity.continuations import SETTINGS, Continuations, compare_continuations
from tinyllama.parity.divergence import Divergence, Run, bisect
from tinyllama.parity.fixture import LENGTH, fixture, random_ids
from tinyllama.parity.gradients import Gradients, compare_gradients
from tinyllama.parity.measure import INT8_LIMITS, Limits
from tinyllama.parity.mutations import MUTATIONS, Mutation, try_mutations
from tinyllama.parity.notebook import Notebook, notebook_failures
from tinyllama.parity.on_ranks import OnRanks
from tinyllama.parity.reference import Right
from tinyllama.parity.report import Report, Search
from tinyllama.parity.subjects import Checkpoint, Extent, Subject, Texts
from tinyllama.parity.trace import Trace, stages

if HAS_FAST:
    from tinyllama.parity.fast import (
        Dequantised,
        dequantised_reference_run,
        divisible,
        fast_layers,
        fast_run,
        products,
        swapped,
    )

# These share their weights' values, and so one truth.
WIDE = ("float64", "float32")
# Tokens in which a divergence is looked for first: most show on few.
SEARCHED = 128
GRADIENT_POSITIONS = 64
# With the weights rounded to 8 bits the oracle has to run again: on fewer positions of a random model.
RANDOM_INT8_POSITIONS = 64
RANDOM_NOTE = "Random weights: what rounding them does to the predictions says nothing, and is not judged."
INDIVISIBLE_NOTE = "8-bit weights are not judged: they need rows that are a multiple of 64."


class Suite:
    """Judges one thing after another; `report` has the results so far."""

    def __init__(
        self,
        search: bool = False,
        done: Callable[[str], object] = lambda what: None,
        on_ranks: OnRanks | None = None,
    ) -> None:
        """Tell `done` of each step; look for divergences where logits fail, or (`search`) everywhere.

        With `on_ranks`, checkpoints are judged as several processes compute them, too.
        """
        self._search, self._done, self._on_ranks = search, done, on_ranks
        self._where = "" if on_ranks is None else on_ranks.name
        self.report = Report(machine())

    def judge(self, subject: Subject, kernels: Mapping[str, Kernel], extent: Extent) -> None:
        """Judge our kernels by transformers; with our own two, also the fast layers and generated ids.

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
            shared = self._shared(subject, dtype, kernels)
            self._compare_with_transformers(subject.name, model, REFERENCES, kernels, texts, truth, shared)
            if dtype == "float32" and kernels == KERNELS and HAS_FAST:
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
        if subject.config.vocab_size != other.config.vocab_size:
            raise InputError(
                f"{subject.name}: expected {other.name}'s vocabulary of {other.config.vocab_size} ids, "
                f"got {subject.config.vocab_size}; compare models that share a tokenizer"
            )
        texts = other.texts(extent)
        for dtype in extent.dtypes:
            self._done(f"{subject.name} {dtype}")
            right, model = other.model(dtype), subject.model(dtype)
            references = {
                f"transformers {name} ({other.name})": reference_run(right, name) for name in REFERENCES
            }
            candidates = {f"tinyllama {name}": kernel_run(model, kernel) for name, kernel in kernels.items()}
            name = f"{subject.name} against {other.name}"
            self._compare(name, right, references, candidates, texts, truths(right, texts))

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
        name, reference = names[0], f"reference: {names[1]}"
        texts, at = subject.texts(extent), stages(subject.config.num_hidden_layers)
        for dtype in extent.dtypes:
            self._done(f"{subject.name} {dtype}")
            model = subject.model(dtype)
            true = kernel_run(deepcopy(model).to(torch.float64), other)
            self._compare(
                f"{subject.name}, {name} against {names[1]}",
                model,
                {reference: kernel_run(model, other)},
                {name: kernel_run(model, kernel)},
                texts,
                {text: true(ids, at) for text, ids in texts.items()},
                partners={name: reference},
                true=true,
            )

    def judge_fixture(self, mutations: Sequence[Mutation] = MUTATIONS) -> None:
        """Show that all this can fail: every planted bug is found; and judge the fixture's gradients."""
        self._done("planted bugs")
        self.report.mutations += try_mutations(mutations)
        model = fixture()
        self._judge_gradients("unit-gain fixture", model, random_ids(LENGTH, model.config.vocab_size))

    def _judge_int8(self, subject: Subject, model: Llama, texts: Texts, truth: Mapping[str, Trace]) -> None:
        """8-bit weights: the computation with them, and what rounding them does to a trained model."""
        name, who = f"{subject.name}, int8 weights", f"tinyllama int8{products(model, 'int8')}"
        self._done(f"{name} float32, rounding")
        layers = fast_layers(model, "int8")
        run, right = fast_run(model, layers), Dequantised(model, layers)
        references = {
            f"transformers {one}": dequantised_reference_run(model, layers, one) for one in REFERENCES
        }
        if not subject.trained:
            texts = {text: ids[:RANDOM_INT8_POSITIONS] for text, ids in texts.items()}
            self._compare(name, right, references, {who: run}, texts, truths(right, texts), note=RANDOM_NOTE)
            return
        run = _remembered(run)
        self._compare(name, right, references, {who: run}, texts, truths(right, texts))
        name += " against the full ones"
        self._compare(name, model, {}, {who: run}, texts, truth, limit=INT8_LIMITS)

    def _judge_more(self, subject: Subject, model: Llama, extent: Extent) -> None:
        """What is judged in float32 only: a long text, generated ids, gradients, the notebook's texts."""
        if ids := subject.long_text(extent):
            # By one kernel, because the scores that eager keeps of a long text take a minute.
            name, texts, kernels = f"{subject.name}, long text", {"english": ids}, {"sdpa": KERNELS["sdpa"]}
            self._compare_with_transformers(name, model, kernels, kernels, texts, truths(model, texts))
        if extent.prompts:
            self._judge_continuations(subject, model, extent)
        if extent.gradients:
            (ids, *_) = subject.texts(extent).values()
            self._judge_gradients(subject.name, model, ids)
        if isinstance(subject, Checkpoint) and subject.official:
            self._done(f"{subject.name}, the notebook's texts")
            failures = notebook_failures(model, subject.tokenizer)
            self.report.notebook.append(Notebook(subject.name, "float32", failures))

    def _compare_with_transformers(
        self,
        name: str,
        model: Llama,
        references: Iterable[str],
        kernels: Mapping[str, Kernel],
        texts: Texts,
        truth: Mapping[str, Trace],
        shared: Mapping[str, Run] | None = None,
    ) -> None:
        candidates = {f"tinyllama {one}": kernel_run(model, kernel) for one, kernel in kernels.items()}
        note = ""
        if kernels == KERNELS and model.dtype != torch.float64 and HAS_FAST:
            who = f"tinyllama stored{products(model, 'stored')}"
            candidates[who] = fast_run(model, fast_layers(model, "stored"))
            if model.dtype == torch.float32 and not divisible(model):
                note = INDIVISIBLE_NOTE
        theirs = {f"transformers {one}": reference_run(model, one) for one in references}
        partners = {who.replace("transformers", "tinyllama"): who for who in theirs}
        for one, run in (shared or {}).items():
            who = f"tinyllama {one}"
            candidates[f"{who}, {self._where}"] = run
            if one in kernels:
                partners[f"{who}, {self._where}"] = who
        self._compare(name, model, theirs, candidates, texts, truth, partners=partners, note=note)

    def _compare(
        self,
        name: str,
        right: Right,
        references: dict[str, Run],
        candidates: dict[str, Run],
        texts: Texts,
        truth: Mapping[str, Trace],
        *,
        partners: Mapping[str, str] | None = None,
        true: Run | None = None,
        limit: Limits | None = None,
        note: str = "",
    ) -> None:
        """Judge one case, and look for divergences; the arguments are those of `compare_runs` and `bisect`.

        With a limit of its own (what rounding the weights may cost) nothing is looked for: every matrix
        diverges by its rounding.
        """
        case = compare_runs(
            references,
            candidates,
            texts,
            truth,
            right.dtype,
            partners,
            done=lambda what: self._done(f"{name}, {what}"),
            limit=limit,
            model=name,
            note=note,
        )
        self.report.cases.append(case)
        for row in case.rows:
            if not limit and (row.failures or (self._search and not row.reference)):
                self._done(f"{name} {case.dtype}, {row.who}: where does it diverge?")
                run, rounding = candidates[row.who], list(references.values())
                text, found = _first_divergence(run, right, texts, rounding, true)
                self.report.searches.append(Search(name, case.dtype, row.who, text, found))

    def _shared(self, subject: Subject, dtype: str, kernels: Iterable[str]) -> dict[str, Run]:
        """The model as several processes compute it, by kernel; and with its weights kept for speed."""
        if self._on_ranks is None or not isinstance(subject, Checkpoint):
            return {}
        place = str(subject.folder), subject.device, dtype
        runs = {one: self._on_ranks.run(*place, "exact", one) for one in kernels}
        if dtype != "float64" and HAS_FAST:
            runs["stored"] = self._on_ranks.run(*place, "stored", "sdpa")
        return runs

    def _judge_continuations(self, subject: Subject, model: Llama, extent: Extent) -> None:
        """Greedy and sampled ids, alone and in a batch."""
        prompts = subject.prompts()[: extent.prompts]
        batch = f"batch of {len(prompts)}"

        def compare(what: str, count: int, calls: Sequence[tuple[list[list[int]], dict[str, Any]]]) -> None:
            self._done(f"{subject.name}, {what}")
            flips = [
                flip for prompts, how in calls for flip in compare_continuations(model, prompts, count, **how)
            ]
            ids = count * sum(len(prompts) for prompts, _ in calls)
            self.report.continuations.append(
                Continuations(subject.name, "float32", what, len(calls), ids, flips)
            )

        compare(f"greedy, {batch}", extent.greedy_ids, [(prompts, {"attention": "eager"})])
        compare("greedy, alone", extent.greedy_ids, [([prompt], {}) for prompt in prompts])
        if HAS_FAST:
            layers = fast_layers(model, "stored")

            def stored(*args: Any, **how: Any) -> list[list[int]]:
                with swapped(model, layers):
                    return generate(*args, **how)

            compare("greedy, stored", extent.greedy_ids, [([prompt], {"ours": stored}) for prompt in prompts])
        alone = [
            ([prompts[seed % len(prompts)]], {"seed": seed, **how})
            for how in SETTINGS
            for seed in range(extent.seeds)
        ]
        compare("sampled, alone", extent.sampled_ids, alone)
        if self._on_ranks is not None and isinstance(subject, Checkpoint):
            ours = partial(self._on_ranks.generate, str(subject.folder), subject.device)
            for what, count, calls in (
                ("greedy", extent.greedy_ids, [([prompt], {}) for prompt in prompts]),
                ("sampled", extent.sampled_ids, alone),
            ):
                shared = [(rows, {"ours": ours, **how}) for rows, how in calls]
                compare(f"{what}, {self._where}", count, shared)
        # Without a repetition penalty, which transformers also applies to the padding.
        penalty_free = [how for how in SETTINGS if "repetition_penalty" not in how]
        batched = [
            (prompts, {"seed": seed, "attention": "eager", **how}) for seed, how in enumerate(penalty_free)
        ]
        compare(f"sampled, {batch}", extent.sampled_ids, batched)

    def _judge_gradients(self, name: str, model: Llama, ids: list[int]) -> None:
        self._done(f"{name}, gradients")
        ids = ids[:GRADIENT_POSITIONS]
        self.report.gradients.append(Gradients(name, "float32", len(ids), compare_gradients(model, ids)))


def _remembered(run: Run) -> Run:
    """Run each text once, because two cases read its values."""
    once = cache(lambda ids, addresses: run(ids, addresses))
    return lambda ids, addresses: once(tuple(ids), tuple(addresses))


@torch.no_grad()
def _first_divergence(
    run: Run, right: Right, texts: Texts, references: list[Run], true: Run | None
) -> tuple[str, Divergence | None]:
    """Search the texts' beginnings, then whole texts; returns what was searched last, and what was found."""
    long = {name: ids for name, ids in texts.items() if len(ids) > SEARCHED}
    beginnings = {
        f"{name}, first {SEARCHED} tokens" if name in long else name: ids[:SEARCHED]
        for name, ids in texts.items()
    }
    for name, ids in (beginnings | long).items():
        if found := bisect(run, right, ids, references, true):
            return name, found
    return "all texts", None
