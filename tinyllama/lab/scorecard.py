"""The scorecard: everything that is measured of changes to attention, beside the unchanged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.device import machine
from tinyllama.errors import InputError
from tinyllama.lab.change import Change
from tinyllama.lab.continuation import Continuation, continuation
from tinyllama.lab.contract import check_attention
from tinyllama.lab.effects import cache_needed, direct_changes, observe, total_changes
from tinyllama.lab.figures import (
    Cache,
    Card,
    Effects,
    Extent,
    ModelFacts,
    Prediction,
    Results,
    Scorecard,
    Unchanged,
)
from tinyllama.lab.speed import Speed, speeds
from tinyllama.model import Llama
from tinyllama.parity.measure import Difference, difference
from tinyllama.text.tokenizer import Tokenizer

Told = Callable[[str], object]


@dataclass(frozen=True)
class Subject:
    """What changes are tried on.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        texts: ids by name: for perplexity, KL, top-1 and the changes inside.
        prompts: ids by name, to be continued.
    """

    model: Llama
    tokenizer: Tokenizer
    texts: Mapping[str, Sequence[int]]
    prompts: Mapping[str, Sequence[int]]

    @property
    def longest(self) -> Sequence[int]:
        """The longest text."""
        return max(self.texts.values(), key=len)


def scorecard(
    subject: Subject, changes: Sequence[Change], extent: Extent, done: Told = lambda what: None
) -> Scorecard:
    """Measure every change beside the unchanged model.

    Args:
        subject: the model, which is as before afterwards, and the texts it reads.
        changes: the changes to try.
        extent: how much is measured.
        done: called with the name of each step.

    Raises:
        InputError: a change gives logits that are not finite.
    """
    model = subject.model
    facts = ModelFacts.of(model)
    contracts = []
    for change in changes:
        done(f"{change.name}: contract")
        shape = facts.heads, facts.kv_heads, model.config.head_dim
        contracts.append(check_attention(change.kernel, *shape, layer=min(change.layers or (0,))))
    sound = [change for change, one in zip(changes, contracts, strict=True) if one.passed]
    tried = [Change("unchanged", model.attentions[0].kernel, ()), *sound]
    effects, caches = _effects(subject, sound, done), _caches(subject, sound, extent, done)
    times: list[Speed | None] = [None] * len(tried)
    if extent.rounds:
        done(f"speed, {extent.rounds} rounds")
        times = [*speeds(model, tried, subject.longest[: extent.context], extent.rounds)]
    texts = _continuations(subject, tried, extent, done)
    results = iter(
        [
            Results(**vars(effect), cache=cache, speed=speed, continuations=continued)
            for effect, cache, speed, continued in zip(effects, caches, times[1:], texts[1:], strict=True)
        ]
    )
    cards = [
        Card(
            name=change.name,
            layers=list(range(facts.layers) if change.layers is None else change.layers),
            heads=list(range(facts.heads) if change.heads is None else change.heads),
            passed=contract.passed,
            contract=list(contract.clauses),
            results=next(results) if contract.passed else None,
        )
        for change, contract in zip(changes, contracts, strict=True)
    ]
    return Scorecard(
        machine=machine(),
        model=facts,
        texts={name: len(ids) for name, ids in subject.texts.items()},
        extent=extent,
        unchanged=Unchanged(times[0], texts[0]),
        changes=cards,
    )


def _effects(subject: Subject, changes: Sequence[Change], done: Told) -> list[Effects]:
    model = subject.model
    parts: list[dict[str, Difference]] = [{} for _ in changes]
    moved: list[list[tuple[Tensor, ...]]] = [[] for _ in changes]
    for text, ids in subject.texts.items():
        done(f"{text}, the unchanged model")
        logits, before = observe(model, ids)
        truth = logits.double()
        direct = direct_changes(model, changes, ids)
        for n, change in enumerate(changes):
            done(f"{text}, {change.name}")
            with change.applied(model):
                logits, values = observe(model, ids)
            if not logits.isfinite().all():
                raise InputError(
                    f"{change.name}: gives logits on {text} that are not finite; leave it out, or use float32"
                )
            parts[n][text] = difference(logits, truth, ids)
            moved[n].append((*total_changes(values, before), direct[n]))
    lengths = torch.tensor([float(len(ids)) for ids in subject.texts.values()])
    share = lengths / lengths.sum()  # every token counts the same, in whichever text
    results = []
    for part, moves in zip(parts, moved, strict=True):
        layers, heads, alone = (
            torch.tensordot(share, torch.stack(each), dims=1).tolist() for each in zip(*moves, strict=True)
        )
        texts = [Prediction.of(text, [one]) for text, one in part.items()]
        results.append(Effects(texts, Prediction.of("all", list(part.values())), layers, heads, alone))
    return results


def _caches(subject: Subject, changes: Sequence[Change], extent: Extent, done: Told) -> list[Cache]:
    ids, found = subject.longest[: 2 * extent.context], []
    for change in changes:
        done(f"cache, {change.name}")
        with change.applied(subject.model):
            found.append(cache_needed(subject.model, ids))
    return found


def _continuations(
    subject: Subject, changes: Sequence[Change], extent: Extent, done: Told
) -> list[list[Continuation]]:
    own: dict[str, list[int]] = {}
    found = []
    for change in changes:
        done(f"continuations, {change.name}")
        with change.applied(subject.model):
            ids = {
                name: continuation(subject.model, p, extent.new_tokens) for name, p in subject.prompts.items()
            }
        own = own or ids
        found.append(
            [
                Continuation.of(name, prompt, ids[name], own[name], subject.tokenizer.decode)
                for name, prompt in subject.prompts.items()
            ]
        )
    return found
