"""Prefill and decode under each kernel, and what a capture costs: timed in turn in one run.

Only ratios within one run mean anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch

from tinyllama.attention import Tap
from tinyllama.generation import stream
from tinyllama.hooks import capture, matching, numel
from tinyllama.lab.change import Change
from tinyllama.lab.continuation import can_cache
from tinyllama.model import Llama

DECODED = 8
TAP_CALLS = 10_000


@dataclass(frozen=True)
class Speed:
    """Medians of several rounds.

    Attributes:
        context: tokens of the prompt.
        prefill: tokens a second.
        decode: tokens a second after the prompt; None for a kernel that cannot use a cache.
        prefill_ratio: over the first change's.
        decode_ratio: over the first change's.
    """

    context: int
    prefill: float
    decode: float | None
    prefill_ratio: float
    decode_ratio: float | None


def speeds(model: Llama, changes: Sequence[Change], ids: Sequence[int], rounds: int) -> list[Speed]:
    """Time every change on one prompt, round by round; the first round warms up and does not count."""
    taken: list[list[tuple[float, float | None]]] = [[] for _ in changes]
    for _ in range(rounds + 1):
        for change, times in zip(changes, taken, strict=True):
            with change.applied(model):
                times.append(_seconds(model, ids))
    # Seconds of the prefill and of a step for each change.
    prefills = [median(prefill for prefill, _ in times[1:]) for times in taken]
    steps = [
        median(step for _, step in times[1:] if step is not None) if times[0][1] is not None else None
        for times in taken
    ]
    return [
        Speed(
            context=len(ids),
            prefill=len(ids) / prefill,
            decode=1 / step if step else None,
            prefill_ratio=prefills[0] / prefill,
            decode_ratio=steps[0] / step if step and steps[0] else None,
        )
        for prefill, step in zip(prefills, steps, strict=True)
    ]


def _seconds(model: Llama, ids: Sequence[int]) -> tuple[float, float | None]:
    """For the prompt with the first token, and for each of the next tokens (their median)."""
    steps = DECODED if can_cache(model) else 0
    tokens = stream(model, ids, max_new_tokens=1 + steps, eos_ids=())
    deque(tokens, maxlen=0)
    first, *rest = tokens.seconds
    return first, median(rest) if rest else None


@dataclass(frozen=True)
class Overhead:
    """Seconds of a pass over a text and of a step after it: medians of rounds, timed in turn.

    Attributes:
        captured: bytes of the values that are captured of one pass.
        taps: the calls of all taps in one pass without hooks.
        plain: a pass without a capture.
        watched: a pass with the capture.
        plain_step: a step without a capture.
        watched_step: a step with the capture.
    """

    captured: int
    taps: float
    plain: float
    watched: float
    plain_step: float
    watched_step: float


@torch.inference_mode()
def overhead(
    model: Llama,
    patterns: Sequence[str],
    ids: Sequence[int],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Overhead:
    """Time passes over a text and single steps after it, with and without a capture, in turn."""
    device = model.embed_tokens.weight.device
    text = torch.tensor([ids], device=device)
    cache = model.new_cache(1, len(ids))
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds + 1):  # the first round warms up
        for watched in (False, True):
            for what, batch in (("pass", text), ("step", text[:, -1:])):
                cache.length = len(ids) - batch.shape[1]
                with capture(model, *patterns, whole=True) if watched else nullcontext():
                    start = clock()
                    model(batch, cache)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times.setdefault((what, watched), []).append(clock() - start)
    middle = {key: median(values[1:]) for key, values in times.items()}
    sizes = (numel(model.config, address, 1, len(ids), len(ids)) for address in matching(model, *patterns))
    return Overhead(
        captured=sum(sizes) * model.embed_tokens.weight.dtype.itemsize,
        taps=_taps(model, clock),
        plain=middle["pass", False],
        watched=middle["pass", True],
        plain_step=middle["step", False],
        watched_step=middle["step", True],
    )


def _taps(model: Llama, clock: Callable[[], float]) -> float:
    """The calls alone: a tap without a hook returns what it gets."""
    tap, x = Tap(), torch.zeros(())
    start = clock()
    for _ in range(TAP_CALLS):
        tap(x)
    count = sum(isinstance(module, Tap) for module in model.modules())
    return count * (clock() - start) / TAP_CALLS
