"""Where a token's time goes: each operation of a decode step, and how long reading its bytes takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

from torch import nn

from tinyllama.bench.figures import Figure, seconds
from tinyllama.bench.measure import Limits, Plan, load_peers
from tinyllama.bench.peers import Setup
from tinyllama.bench.results import Operation, Profile, Rate, Results, Run
from tinyllama.bench.torch_peers import Ours, Transformers
from tinyllama.progress import step_progress

ATTENTION, OTHER = "RoPE, cache and attention", "everything else"
# The last part of a module's path -> the operation that it is, without the modules inside it.
OPERATIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "q, k, v, o projections"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "gate, up, down projections"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), "norms"),
    "self_attn": ATTENTION,
    "mlp": "SwiGLU product",
    "lm_head": "lm_head",
    "embed_tokens": "embedding",
}


def operations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is, or holds, an operation of its own."""
    for path, module in model.named_modules():
        name = OPERATIONS.get(path.rpartition(".")[2])
        if name is not None:
            yield name, module


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, float]]:
    """Add up the seconds that each operation takes, without the modules inside it."""
    taken = dict.fromkeys(OPERATIONS.values(), 0.0)
    running: list[tuple[float, list[float]]] = []  # start, and the seconds of each module inside

    def before(_module: nn.Module, _inputs: Any) -> None:
        running.append((time.perf_counter(), []))

    def after(name: str, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        start, inside = running.pop()
        passed = time.perf_counter() - start
        taken[name] += passed - sum(inside)
        if running:
            running[-1][1].append(passed)

    with ExitStack() as hooks:
        for name, module in operations(model):
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(partial(after, name)))
        yield taken


def measure_profiles(run: Run, names: Sequence[str], setup: Setup, plan: Plan, limits: Limits) -> Results:
    """Load the peers, and profile each at each context on the CPU."""
    peers, left_out = load_peers(names, setup)
    profiles, read = [], []
    with step_progress(len(peers) * len(plan.contexts)) as step:
        for peer in peers:
            assert isinstance(peer, Ours | Transformers)
            for context in plan.contexts:
                read.append(limits.read_bandwidth())
                profiles.append(profile(peer, context, plan))
                step(f"{peer.name} at {context}")
    return Results(run, Rate.of(read), {}, left_out, profiles=profiles)


def profile(peer: Ours | Transformers, context: int, plan: Plan) -> Profile:
    """Time decode steps with and without a clock around their operations, in turn."""
    plain, with_clock = [], []
    taken: dict[str, list[float]] = {name: [] for name in OPERATIONS.values()}
    for _ in range(plan.rounds + 1):
        plain.append(1 / Figure("decode at", context).measure(peer, plan.steps).speed)
        tokens = peer.decode(context, plan.steps + 1)
        next(tokens)
        with watched(peer.model) as found:
            with_clock.append(seconds(partial(deque, tokens, maxlen=0)) / plan.steps)
        for name, spent in found.items():
            taken[name].append(spent / plan.steps)
    whole, needed = median(with_clock[1:]), bytes_by_operation(peer, context)  # the first round warms up
    parts = [Operation(name, median(spent[1:]), needed[name]) for name, spent in taken.items()]
    parts.append(Operation(OTHER, whole - sum(part.seconds for part in parts), 0))
    return Profile(peer.name, context, median(plain[1:]), whole, parts)


def bytes_by_operation(peer: Ours | Transformers, context: int) -> dict[str, int]:
    """What each operation of a step must read: weights, and cached keys and values."""
    needed = dict.fromkeys(OPERATIONS.values(), 0)
    for name, module in operations(peer.model):
        if not isinstance(module, nn.Embedding):
            needed[name] += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    needed[ATTENTION] += context * peer.cached_bytes
    return needed
