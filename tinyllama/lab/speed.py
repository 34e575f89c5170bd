"""Prefill and decode under each kernel, in turn in one run: only such ratios mean anything."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tinyllama.generation import stream
from tinyllama.lab.change import Change
from tinyllama.lab.continuation import can_cache
from tinyllama.model import Llama

DECODED = 8


@dataclass(frozen=True)
class Speed:
    """Medians of several rounds.

    Attributes:
        prefill: tokens a second.
        decode: tokens a second at that context; None for a kernel that cannot use a cache.
    """

    prefill: float
    decode: float | None


def speeds(model: Llama, changes: Sequence[Change], ids: Sequence[int], rounds: int) -> list[Speed]:
    """Time every change on the same prompt, round by round; the first round warms up and does not count."""
    taken: list[list[tuple[float, float | None]]] = [[] for _ in changes]
    for _ in range(rounds + 1):
        for change, times in zip(changes, taken, strict=True):
            with change.applied(model):
                times.append(_seconds(model, ids))
    results = []
    for times in taken:
        prefill = median(first for first, _ in times[1:])
        steps = [step for _, step in times[1:] if step is not None]
        results.append(Speed(len(ids) / prefill, 1 / median(steps) if steps else None))
    return results


def _seconds(model: Llama, ids: Sequence[int]) -> tuple[float, float | None]:
    """For the prompt and the first token, and for each of the next ones (their median)."""
    steps = DECODED if can_cache(model) else 0
    tokens = stream(model, ids, max_new_tokens=1 + steps, eos_ids=())
    deque(tokens, maxlen=0)
    first, *rest = tokens.seconds
    return first, median(rest) if rest else None
