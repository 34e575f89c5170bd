"""Where a token's time goes: every operation of a decode step, beside what reading its bytes must cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama.bench.ours import EMBEDDING, Ours, cached_bytes, weight_bytes
from tinyllama.cache import KVCache
from tinyllama.fast.fused import FusedAttention, FusedBlock
from tinyllama.model import Block

Figures = dict[str, Any]

BETWEEN = "between the operations"
SAMPLING = "sampling"
# The last part of a module's name -> the operation that it, or the way to it, belongs to.
GROUPS = {
    EMBEDDING: "embedding",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "rotary": "RoPE",
    "q_rot": "RoPE",
    "k_rot": "RoPE",
    "scores": "attention",
    "pattern": "attention",
    "z": "attention",
    "product": "SwiGLU product",
}
# These stand behind an operation that is no module: what passed since the last mark is that operation.
TAPS = ("q_rot", "k_rot", "scores", "pattern", "z", "product")
# Not heard in a fused attention, which would compute apart what someone listens to: it is all `attention`.
TURNED = ("q_rot", "k_rot", "scores", "pattern")
CACHE_WRITE = "cache write"
ORDER = (
    "embedding",
    "norms",
    "q_proj",
    "k_proj",
    "v_proj",
    "RoPE",
    CACHE_WRITE,
    "attention",
    "o_proj",
    "gate_proj",
    "up_proj",
    "SwiGLU product",
    "down_proj",
    "lm_head",
    SAMPLING,
)


class Clock:
    """Marks in time: each gives what passed since the last one to an operation.

    On a GPU the marks are events in its own queue, so that it need not be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, group: str) -> None:
        """End an operation here."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((group, event))
        else:
            self.marks.append((group, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Seconds by operation since the first mark; the clock is empty again."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, start), (group, end) in zip(self.marks, self.marks[1:], strict=False):
            passed = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            seconds[group] = seconds.get(group, 0.0) + passed
        self.marks = []
        return seconds


def operations(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Last name, operation and module of every module that is one operation."""
    found: list[str] = []
    for path, module in model.named_modules():
        name = path.split(".")[-1]
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and (name in GROUPS or name in ORDER or not any(module.children())):
            found.append(path)
            yield name, GROUPS.get(name, name), module


@contextmanager
def watched(model: nn.Module, cache: KVCache, clock: Clock) -> Iterator[None]:
    """The clock's marks around every operation of the model and behind every write to the cache."""
    plain = type(cache)
    fused = any(isinstance(module, FusedAttention) for module in model.modules())

    class Watched(plain):  # type: ignore[valid-type, misc]
        def write(self, *args: Any) -> tuple[Tensor, Tensor]:
            result = super().write(*args)
            clock.mark(CACHE_WRITE)
            return result

    def before(_module: nn.Module, _args: Any) -> None:
        clock.mark(BETWEEN)

    def after(group: str, _module: nn.Module, _args: Any, _result: Any) -> None:
        clock.mark(group)

    with ExitStack() as hooks:
        for name, group, module in operations(model):
            if fused and name in TURNED:
                continue
            if name not in TAPS:
                hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(partial(after, group)))
        cache.__class__ = plain if fused else Watched
        try:
            yield
        finally:
            cache.__class__ = plain


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Let every layer be computed part by part, as it is while the clock listens to its parts."""
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Block):
                hooks.enter_context(module.mlp.product.register_forward_hook(lambda *_: None))
        yield


def breakdown(
    subject: Ours, context: int, steps: int, rounds: int, bandwidth: Callable[[], float]
) -> Figures:
    """Time the operations of decode steps at a context, and whole steps without a clock, in turn.

    The operations and what is left, `between the operations`, sum to a step that is computed part by part.

    Returns:
        `step`, seconds of a step as it is, and `compiled`, whether compiled code takes its layers whole;
        `apart`, of one that is computed part by part; `with_clock`, of one that the clock listens to;
        `bandwidth`; `bytes` of the step; and `operations`: name, seconds, bytes that it must read, and how
        long reading them takes.
    """
    plain: list[float] = []
    by_parts: list[float] = []
    timed: list[dict[str, float]] = []
    read: list[float] = []
    for turn in range(rounds + 1):
        read.append(bandwidth())
        steps_taken = _steps(subject, context, steps)
        with apart(subject.model):
            steps_apart = _steps(subject, context, steps)
        watched_steps = _watch(subject, context, steps)
        if turn:  # the first round warms up
            plain += steps_taken
            by_parts += steps_apart
            timed += watched_steps
    speed, whole = median(read[1:]), median(by_parts)
    names = sorted({name for seconds in timed for name in seconds} - {BETWEEN}, key=_place)
    middle = {name: median(seconds.get(name, 0.0) for seconds in timed) for name in names}
    middle[BETWEEN] = whole - sum(middle.values())
    needed = bytes_by_operation(subject, context)
    return {
        "subject": subject.name,
        "context": context,
        "step": median(plain),
        "compiled": any(isinstance(module, FusedBlock) for module in subject.model.modules()),
        "apart": whole,
        "with_clock": median(sum(seconds.values()) for seconds in timed),
        "bandwidth": speed,
        "bytes": sum(needed.values()),
        "operations": [
            {
                "name": name,
                "seconds": seconds,
                "bytes": needed.get(name, 0),
                "must": needed.get(name, 0) / speed,
            }
            for name, seconds in middle.items()
        ],
    }


def _steps(subject: Ours, context: int, steps: int) -> list[float]:
    """Seconds of each step."""
    tokens = subject.stream(context, steps, subject.filled_cache(context + steps + 1))
    deque(tokens, maxlen=0)
    return tokens.seconds[1:]


def _place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def _watch(subject: Ours, context: int, steps: int) -> list[dict[str, float]]:
    """Seconds by operation of each step."""
    cache = subject.filled_cache(context + steps + 1)
    tokens = subject.stream(context, steps, cache)
    clock, taken = Clock(subject.device), []
    with watched(subject.model, cache, clock):
        for _ in range(steps):
            clock.mark("start")
            next(tokens)
            clock.mark(SAMPLING)  # since lm_head, the last module
            taken.append(clock.take())
    return taken


def bytes_by_operation(subject: Ours, context: int) -> dict[str, int]:
    """What each operation of a step must read: weights, one row of the embedding, cached keys and values.

    The cache's write counts what it writes. Activations are left out: they stay in the processor's cache.
    """
    needed: dict[str, int] = {}
    for name, group, module in operations(subject.model):
        if name != EMBEDDING:
            needed[group] = needed.get(group, 0) + weight_bytes(module)
    table = subject.model.embed_tokens.weight
    kept = cached_bytes(subject.model)
    needed["embedding"] = table.shape[1] * table.element_size()
    needed[CACHE_WRITE] = kept
    needed["attention"] = needed.get("attention", 0) + context * kept
    return needed
