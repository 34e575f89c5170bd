"""A check for each clause of the contract, which yields a description of every example that breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from tinyllama.kernels import wrong_result
from tinyllama.lab.trial import Trial, differs, name_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A step of 1e-3 and 1%: a missing term changes a slope by tens of percent, and a softmax in float32 (some
# kernels have one) changes it by a thousandth.
GRADCHECK = partial(
    torch.autograd.gradcheck,
    eps=1e-3,
    atol=1e-3,
    rtol=1e-2,
    fast_mode=True,
    check_undefined_grad=False,
    raise_exception=False,
)


def _shape(trial: Trial, B: int, T: int) -> Iterator[str]:
    q, k, v = trial.draw(B, T)
    z = trial.whole((q, k, v))
    if not isinstance(z, Tensor) or z.shape != q.shape:
        yield str(wrong_result(z, q, trial.kernel))


def _pure(trial: Trial, B: int, T: int) -> Iterator[str]:
    whole, last = torch.arange(T).expand(B, -1), torch.full((B, 1), T - 1)
    # A whole text, with and without the word that the mask is a plain triangle; padding; a token and a cache.
    ways = (
        trial.visible(whole, causal=True),
        trial.visible(whole),
        trial.visible(whole - 1),
        trial.visible(last, whole[:1]),
    )
    for mask in ways:
        q, k, v = trial.draw(B, T)
        inputs = q[:, :, -mask.query_positions.shape[1] :].clone(), k, v
        given = dict(zip(("q", "k", "v", "the mask"), (*inputs, mask.allowed), strict=True))
        copies = {name: x.clone() for name, x in given.items()}
        z = trial.attend(inputs, mask).clone()
        for name, x in given.items():
            if not torch.equal(x, copies[name]):
                yield f"{name} is changed in place; caches and later layers would see it"
        if not torch.allclose(trial.attend(inputs, mask), z, rtol=0, atol=0, equal_nan=True):
            yield "the same inputs give another result the second time"


def _causal(trial: Trial, B: int, T: int) -> Iterator[str]:
    inputs, others = trial.draw(B, T), trial.draw(B, T, seed=1)
    for causal in (True, False):
        z = trial.whole(inputs, causal)
        for t in _sampled(T)[1:]:
            pairs = zip(inputs, others, strict=True)
            changed = trial.whole([torch.cat((x[:, :, :t], y[:, :, t:]), dim=2) for x, y in pairs], causal)
            moved = (changed != z)[:, :, :t].any(dim=-1).any(dim=1).any(dim=0)  # (t,)
            if moved.any():
                yield f"token {int(moved.nonzero()[0])} changes when token {t} does"


def _cache(trial: Trial, B: int, T: int) -> Iterator[str]:
    q, k, v = trial.draw(B, T)
    z = trial.whole((q, k, v))
    for unused in (0, 2):
        # Slots that are not written yet hold old numbers.
        _, *old = trial.draw(B, T + unused, seed=1)
        for t in _sampled(T):
            S = t + 1 + unused
            cached = [
                torch.cat((x[:, :, : t + 1], y[:, :, t + 1 : S]), 2) for x, y in zip((k, v), old, strict=True)
            ]
            step = trial.run((q[:, :, t : t + 1], *cached), torch.full((B, 1), t), torch.arange(S)[None])
            slots = f"{S} slots, {unused} of them not yet written" if unused else f"{S} slots"
            yield from differs(f"token {t} alone, from a cache of {slots},", step, z[:, :, t : t + 1])


def _chunks(trial: Trial, B: int, T: int) -> Iterator[str]:
    q, k, v = trial.draw(B, T)
    z, slots = trial.whole((q, k, v)), torch.arange(T)
    for start in _sampled(T):
        part = trial.run((q[:, :, start:], k, v), slots[start:].expand(B, -1), slots[None])
        yield from differs(f"the piece of tokens {start} to {T - 1}", part, z[:, :, start:])


def _batch(trial: Trial, B: int, T: int) -> Iterator[str]:
    inputs = trial.draw(3, T)
    z = trial.whole(inputs)
    for row in range(3):
        alone = trial.whole([x[row : row + 1] for x in inputs])
        yield from differs(f"row {row} of 3, compared with the row alone,", z[row : row + 1], alone)


def _padding(trial: Trial, B: int, T: int) -> Iterator[str]:
    for pad in (1, 3, 64):
        short, long = trial.draw(1, T), trial.draw(1, T + pad, seed=1)
        expected = trial.whole(short), trial.whole(long)
        # Beside a row without padding; the numbers in the padding are large.
        filler = [1e3 * x for x in trial.draw(1, pad, seed=2)]
        padded = [torch.cat((torch.cat((f, x), 2), y)) for f, x, y in zip(filler, short, long, strict=True)]
        # In a cache a token is in the slot of its position, and padding is in none.
        cached = [torch.cat((torch.cat((x, f), 2), y)) for f, x, y in zip(filler, short, long, strict=True)]
        slots = torch.arange(T + pad)
        positions = torch.stack(((slots - pad).clamp(min=-1), slots))
        ways = {
            "": trial.run(padded, positions),
            " with a cache": trial.run((padded[0], *cached[1:]), positions, slots[None]),
        }
        for how, z in ways.items():
            yield from differs(f"a text after {pad} of padding{how}", z[:1, :, pad:], expected[0])
            yield from differs(f"a row beside one with {pad} of padding{how}", z[1:], expected[1])


def _groups(trial: Trial, B: int, T: int) -> Iterator[str]:
    G, shape = trial.H // trial.K, f"with H={trial.H}, K={trial.K}"
    q, k, v = trial.draw(B, T)
    z = trial.whole((q, k, v))
    repeated = trial.whole((q, k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)))
    yield from differs(f"{shape} it, compared with KV heads repeated {G} times,", z, repeated)
    _, other_k, other_v = trial.draw(B, T, seed=1)
    for head in range(trial.K):
        changed = k.clone(), v.clone()
        changed[0][:, head], changed[1][:, head] = other_k[:, head], other_v[:, head]
        moved = trial.whole((q, *changed))
        for h in range(trial.H):
            if h // G != head and any(differs("", moved[:, h], z[:, h])):
                yield f"{shape} query head {h} reads KV head {head}"


def _dtype(trial: Trial, B: int, T: int) -> Iterator[str]:
    for dtype in DTYPES:
        z = trial.whole(trial.draw(B, T, dtype))
        if z.dtype != dtype:
            yield f"expected {name_of(dtype)}, got {name_of(z.dtype)}"


def _finite(trial: Trial, B: int, T: int) -> Iterator[str]:
    for dtype in DTYPES:
        inputs = trial.draw(B, T, dtype)
        for pad in {1, T}:
            positions = (torch.arange(T) - pad).clamp(min=-1).expand(B, -1)
            if not trial.run(inputs, positions).isfinite().all():
                yield f"in {name_of(dtype)} {pad} of padding gives a result that is not finite"


def _gradient(trial: Trial, B: int, T: int) -> Iterator[str]:
    inputs = [x.requires_grad_() for x in trial.draw(B, T, torch.float64)]
    weights = trial.draw(B, T, torch.float64, seed=1)[0]
    # With and without the word that the mask is a plain triangle: kernels have a path for each.
    for causal in (True, False):
        for n, name in enumerate("qkv"):

            def total(x: Tensor, n: int = n, causal: bool = causal) -> Tensor:
                return (trial.whole([*inputs[:n], x, *inputs[n + 1 :]], causal) * weights).sum()

            if not GRADCHECK(total, inputs[n]):
                yield f"the gradient of {name} is not the slope of the output"
    z = trial.run(inputs, (torch.arange(T) - 1).expand(B, -1))
    if z.requires_grad:
        gradients = torch.autograd.grad((z * weights).sum(), inputs, allow_unused=True)
        for name, gradient in zip("qkv", gradients, strict=True):
            if gradient is not None and not gradient.isfinite().all():
                yield f"with 1 of padding the gradient of {name} is not finite"


def _compile(trial: Trial, B: int, T: int) -> Iterator[str]:
    graphs: list[Any] = []

    def collect(graph: Any, _inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return trial.run((q, k, v), positions, keys)

    # A code object of its own: the compiler files its results under it, those for other kernels too.
    own = FunctionType(step.__code__.replace(co_name="kernel"), globals(), "kernel", None, step.__closure__)
    q, k, v = trial.draw(B, T)
    step_inputs = (q[:, :, -1:], k, v, torch.arange(B)[:, None] + T - B, torch.arange(T)[None])
    with torch.no_grad():
        expected = step(*step_inputs)
        try:
            compiled = torch.compile(own, fullgraph=True, backend=collect)(*step_inputs)
        except Exception as error:
            yield f"a step from a cache: {_reason(str(error))}"
            return
        if len(graphs) != 1:
            yield f"a step from a cache: expected one graph, got {len(graphs)}"
        # The compiler accepts an .item() into the graph silently: on a GPU every step would wait for it.
        if any(node.target in ("item", "tolist") for graph in graphs for node in graph.graph.nodes):
            yield "a step from a cache: .item() or .tolist() looks at data within the graph"
        yield from differs("a compiled step from a cache", compiled, expected)


def _reason(message: str) -> str:
    """The first line of the compiler's message, and the user's own line that it is about."""
    first, *rest = [line.strip() for line in message.strip().splitlines()]
    own = re.findall(r'^File "(.+)", line (\d+), in .*\n(.+)$', "\n".join(rest), re.MULTILINE)
    return f"{first} ({own[-1][0]}:{own[-1][1]}: {own[-1][2]})" if own else first


def _sampled(T: int) -> list[int]:
    """All tokens of a short text, some of a long one."""
    return list(range(T)) if T <= 8 else [1, 2, T // 3, T - 2, T - 1]


Check = Callable[[Trial, int, int], Iterator[str]]
# Rows and tokens. The last text is longer than the default windows of the variants, so that these act.
SIZES = ((1, 1), (1, 2), (1, 3), (2, 3), (1, 5), (2, 8), (1, 17), (1, 40), (1, 300))
SHORT = SIZES[:6]
# Each clause with its check, and the sizes on which it is checked.
CHECKS: dict[str, tuple[Check, tuple[tuple[int, int], ...]]] = {
    "shape": (_shape, SIZES),
    "pure": (_pure, SIZES),
    "causal": (_causal, SIZES),
    "cache": (_cache, SIZES),
    "chunks": (_chunks, SIZES),
    "batch": (_batch, SIZES),
    "padding": (_padding, SIZES),
    "groups": (_groups, SIZES),
    "dtype": (_dtype, SHORT),
    "finite": (_finite, SIZES),
    "gradient": (_gradient, SHORT),
    "compile": (_compile, ((2, 8),)),
}
