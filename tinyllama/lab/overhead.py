"""What it costs that values can be read: the taps when nobody does, and a capture when somebody does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch

from tinyllama.attention import Tap
from tinyllama.hooks import capture, matching, numel
from tinyllama.model import Llama

CALLS = 10_000


@dataclass(frozen=True)
class Overhead:
    """Seconds, medians of rounds in turn.

    Attributes:
        captured: bytes of the values of one pass.
        taps: what the calls of all taps take in one pass without hooks.
        plain: a pass over the text without a capture.
        watched: the same with one.
        plain_step: one token more, from the cache.
        watched_step: the same with a capture.
    """

    captured: int
    taps: float
    plain: float
    watched: float
    plain_step: float
    watched_step: float


@torch.inference_mode()
def overhead(model: Llama, patterns: Sequence[str], ids: Sequence[int], rounds: int) -> Overhead:
    """Time passes over a text and single steps after it, with and without a capture, in turn."""
    device = model.embed_tokens.weight.device
    text, last = torch.tensor([ids], device=device), torch.tensor([[len(ids) - 1]], device=device)
    cache = model.new_cache(1, len(ids))
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for watched in (False, True):
            for what, batch, place in (("pass", text, None), ("step", text[:, -1:], last)):
                with capture(model, *patterns) if watched else nullcontext():
                    start = time.perf_counter()
                    model(batch, cache, place)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times.setdefault((what, watched), []).append(time.perf_counter() - start)
    middle = {key: median(values[1:]) for key, values in times.items()}
    sizes = (numel(model.config, address, 1, len(ids), len(ids)) for address in matching(model, *patterns))
    return Overhead(
        captured=sum(sizes) * model.embed_tokens.weight.dtype.itemsize,
        taps=_taps(model),
        plain=middle["pass", False],
        watched=middle["pass", True],
        plain_step=middle["step", False],
        watched_step=middle["step", True],
    )


def _taps(model: Llama) -> float:
    """Of the calls themselves: a tap without a hook gives back what it gets."""
    tap, x = Tap(), torch.zeros(())
    start = time.perf_counter()
    for _ in range(CALLS):
        tap(x)
    count = sum(isinstance(module, Tap) for module in model.modules())
    return count * (time.perf_counter() - start) / CALLS
