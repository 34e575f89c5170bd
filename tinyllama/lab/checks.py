"""The clauses of the contract as properties: each check yields the examples that break it, smallest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, AttentionMask, Kernel
from tinyllama.config import LlamaConfig
from tinyllama.parity.measure import CEILING
from tinyllama.rope import RotaryEmbedding

# Rows and tokens. The last is longer than the windows of the variants, so that these act.
SIZES = [(1, 1), (1, 2), (1, 3), (2, 3), (1, 5), (2, 8), (1, 17), (1, 40), (1, 300)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of the output's RMS: a missing term of a gradient changes it by tens of percent, float32 by a thousandth.
GRADIENT_ERROR = 1e-2
STEP = 1e-4


@dataclass(frozen=True)
class Trial:
    """A kernel and the shape in which it is tried, on the CPU.

    Attributes:
        kernel: what is in question.
        H: query heads.
        K: KV heads.
        D: numbers in a head.
        layer: the one that the kernel is told it is in.
        tried: the number of tokens of every draw so far, to say in which one a kernel failed.
    """

    kernel: Kernel
    H: int
    K: int
    D: int
    layer: int
    tried: list[int] = field(default_factory=list)

    def draw(self, B: int, T: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """Random q, k and v; T goes to `tried`."""
        self.tried.append(T)
        generator = torch.Generator().manual_seed(seed)
        heads = (self.H, self.K, self.K)
        return [torch.randn(B, n, T, self.D, generator=generator).to(dtype) for n in heads]

    def run(
        self, inputs: Sequence[Tensor], positions: Tensor, keys: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """The kernel's output for q, k, v at these positions, queries (B, T) and keys (B or 1, S)."""
        return self.attend(inputs, self.visible(positions, keys, causal))

    def visible(self, positions: Tensor, keys: Tensor | None = None, causal: bool = False) -> AttentionMask:
        """What the kernel is told of positions and mask."""
        return AttentionMask.of(positions, positions if keys is None else keys, causal, self.rotary)

    def attend(self, inputs: Sequence[Tensor], mask: AttentionMask) -> Tensor:
        """The kernel's output."""
        q, k, v = inputs
        context = AttentionContext(mask, self.D**-0.5, self.layer, lambda x: x, lambda x: x)
        return self.kernel(q, k, v, context)

    def full(self, inputs: Sequence[Tensor], causal: bool = True) -> Tensor:
        """That for whole texts."""
        B, _, T, _ = inputs[0].shape
        return self.run(inputs, torch.arange(T).expand(B, -1), causal=causal)

    @cached_property
    def rotary(self) -> RotaryEmbedding:
        """RoPE for this D."""
        return RotaryEmbedding(LlamaConfig(head_dim=self.D))


def _shape(trial: Trial) -> Iterator[str]:
    for B, T in SIZES:
        q, k, v = trial.draw(B, T)
        z = trial.full((q, k, v))
        if not isinstance(z, Tensor) or z.shape != q.shape:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            yield f"q {list(q.shape)}, k and v {list(k.shape)}: expected {list(q.shape)}, got {got}"


def _pure(trial: Trial) -> Iterator[str]:
    for B, T in SIZES:
        all_of_it, last = torch.arange(T).expand(B, -1), torch.full((B, 1), T - 1)
        # A whole text, told and not told that the mask is a plain triangle; padding; a token and a cache.
        ways = (
            trial.visible(all_of_it, causal=True),
            trial.visible(all_of_it),
            trial.visible(all_of_it - 1),
            trial.visible(last, all_of_it[:1]),
        )
        for mask in ways:
            q, k, v = trial.draw(B, T)
            given = {"q": q[:, :, -mask.query_positions.shape[1] :].clone(), "k": k, "v": v}
            given["the mask"] = mask.allowed
            copies = {name: x.clone() for name, x in given.items()}
            inputs = given["q"], k, v
            z = trial.attend(inputs, mask).clone()
            for name, x in given.items():
                if not torch.equal(x, copies[name]):
                    yield f"T={T}: {name} is changed in place; caches and later layers would see it"
            if not torch.allclose(trial.attend(inputs, mask), z, rtol=0, atol=0, equal_nan=True):
                yield f"T={T}: the same inputs give something else the second time"


def _causal(trial: Trial) -> Iterator[str]:
    for B, T in SIZES:
        now, other = trial.draw(B, T), trial.draw(B, T, seed=1)
        # Told that the mask is a plain triangle, and not told.
        for causal in (True, False):
            z = trial.full(now, causal)
            for t in _sampled(T)[1:]:
                changed = [
                    torch.cat((x[:, :, :t], y[:, :, t:]), dim=2) for x, y in zip(now, other, strict=True)
                ]
                before = trial.full(changed, causal)[:, :, :t]
                if not torch.equal(before, z[:, :, :t]):
                    first = int((before != z[:, :, :t]).any(dim=-1).any(dim=1).any(dim=0).nonzero()[0])
                    yield f"T={T}: token {first} changes when token {t} does"


def _cache(trial: Trial) -> Iterator[str]:
    for B, T in SIZES:
        q, k, v = trial.draw(B, T)
        z = trial.full((q, k, v))
        # Slots that were not written yet hold something old.
        for unused in (0, 2):
            _, old_k, old_v = trial.draw(B, T + unused, seed=1)
            slots = torch.arange(T + unused)[None]
            for t in _sampled(T):
                now_k, now_v = old_k.clone(), old_v.clone()
                now_k[:, :, : t + 1], now_v[:, :, : t + 1] = k[:, :, : t + 1], v[:, :, : t + 1]
                S = t + 1 + unused
                now = (q[:, :, t : t + 1], now_k[:, :, :S], now_v[:, :, :S])
                step = trial.run(now, torch.full((B, 1), t), slots[:, :S])
                if wrong := _differs(step, z[:, :, t : t + 1]):
                    what = f" with {unused} slots not yet written" if unused else ""
                    yield f"T={T}: token {t} by itself, from a cache of {S} slots{what}, {wrong}"


def _chunks(trial: Trial) -> Iterator[str]:
    for B, T in SIZES:
        q, k, v = trial.draw(B, T)
        z = trial.full((q, k, v))
        slots = torch.arange(T)
        for start in _sampled(T):
            part = trial.run((q[:, :, start:], k, v), slots[start:].expand(B, -1), slots[None])
            if wrong := _differs(part, z[:, :, start:]):
                yield f"T={T}: tokens {start} to {T - 1} after the others {wrong}"


def _batch(trial: Trial) -> Iterator[str]:
    for _, T in SIZES:
        inputs = trial.draw(3, T)
        z = trial.full(inputs)
        for row in range(3):
            alone = trial.full([x[row : row + 1] for x in inputs])
            if wrong := _differs(z[row : row + 1], alone):
                yield f"T={T}: row {row} of 3 {wrong} from that row alone"


def _padding(trial: Trial) -> Iterator[str]:
    for _, T in SIZES:
        for pad in (1, 3, 64):
            short, long = trial.draw(1, T), trial.draw(1, T + pad, seed=1)
            expected = trial.full(short), trial.full(long)
            # Beside a row without padding; what stands in the padding is large.
            filler = [1e3 * x for x in trial.draw(1, pad, seed=2)]
            q, k, v = (
                torch.cat((torch.cat((f, x), dim=2), y)) for f, x, y in zip(filler, short, long, strict=True)
            )
            count = torch.arange(T + pad)
            positions = torch.stack(((count - pad).clamp(min=-1), count))
            # In a cache a token is in the slot of its position, and padding in none.
            slots = [
                torch.cat((torch.cat((x, f), dim=2), y))
                for f, x, y in zip(filler[1:], short[1:], long[1:], strict=True)
            ]
            ways = {
                "": trial.run((q, k, v), positions),
                ", into a cache,": trial.run((q, *slots), positions, count[None]),
            }
            for how, z in ways.items():
                if wrong := _differs(z[:1, :, pad:], expected[0]):
                    yield f"T={T}: after {pad} of padding{how} it {wrong}"
                if wrong := _differs(z[1:], expected[1]):
                    yield f"T={T}: beside a row with {pad} of padding{how} a row of {T + pad} {wrong}"


def _groups(trial: Trial) -> Iterator[str]:
    G = trial.H // trial.K
    for B, T in SIZES:
        q, k, v = trial.draw(B, T)
        z = trial.full((q, k, v))
        repeated = trial.full((q, k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)))
        if wrong := _differs(z, repeated):
            yield f"T={T}, H={trial.H}, K={trial.K}: it {wrong} from that with KV heads repeated {G} times"
        _, other_k, other_v = trial.draw(B, T, seed=1)
        for head in range(trial.K):
            changed = [x.clone() for x in (k, v)]
            changed[0][:, head], changed[1][:, head] = other_k[:, head], other_v[:, head]
            moved = trial.full((q, *changed))
            for h in range(trial.H):
                if h // G != head and _differs(moved[:, h], z[:, h]):
                    yield f"T={T}, H={trial.H}, K={trial.K}: query head {h} reads KV head {head}"


def _dtype(trial: Trial) -> Iterator[str]:
    for B, T in SIZES[:6]:
        for dtype in DTYPES:
            z = trial.full(trial.draw(B, T, dtype))
            if z.dtype != dtype:
                yield f"T={T}: expected {_name(dtype)}, got {_name(z.dtype)}"


def _finite(trial: Trial) -> Iterator[str]:
    for B, T in SIZES:
        for dtype in DTYPES:
            inputs = trial.draw(B, T, dtype)
            for pad in {1, T}:
                positions = (torch.arange(T) - pad).clamp(min=-1).expand(B, -1)
                if not trial.run(inputs, positions).isfinite().all():
                    yield f"T={T}, {_name(dtype)}: {pad} of padding gives something that is not finite"


def _gradient(trial: Trial) -> Iterator[str]:
    for B, T in SIZES[1:6]:
        inputs = [x.requires_grad_() for x in trial.draw(B, T, torch.float64)]
        weights = trial.draw(B, T, torch.float64, seed=1)[0]
        # Told and not told that the mask is a plain triangle: two paths through many a kernel.
        for causal in (True, False):
            gradients = _gradients(trial.full(inputs, causal), weights, inputs)
            for n, name in enumerate("qkv"):
                numeric, analytic = _slopes(trial, inputs, n, gradients[n], weights, causal)
                error = (analytic - numeric).square().mean().sqrt()
                size = numeric.square().mean().sqrt() + weights.numel() ** 0.5 * 0.1
                if not error <= GRADIENT_ERROR * size:
                    slopes = f"{numeric[0]:.2e}, by its gradient {analytic[0]:.2e}"
                    yield f"T={T}: along {name} it changes by {slopes}"
        padded = trial.run(inputs, (torch.arange(T) - 1).expand(B, -1))
        for name, gradient in zip("qkv", _gradients(padded, weights, inputs), strict=True):
            if not gradient.isfinite().all():
                yield f"T={T}: with 1 of padding the gradient of {name} is not finite"


def _slopes(
    trial: Trial, inputs: list[Tensor], n: int, gradient: Tensor, weights: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """How (z * weights).sum() changes along three directions of input n: measured, and by its gradient."""
    measured, predicted = [], []
    for seed in range(3):
        direction = torch.randn(inputs[n].shape, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            ahead, behind = (
                trial.full([*inputs[:n], inputs[n] + step * direction, *inputs[n + 1 :]], causal)
                for step in (STEP, -STEP)
            )
        measured.append(((ahead - behind) * weights).sum() / (2 * STEP))
        predicted.append((gradient * direction).sum())
    return torch.stack(measured), torch.stack(predicted)


def _gradients(z: Tensor, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Those of (z * weights).sum(); zero for an input that it does not depend on."""
    if not z.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad((z * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _compile(trial: Trial) -> Iterator[str]:
    graphs: list[Any] = []

    def collect(graph: Any, _inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return trial.run((q, k, v), positions, keys)

    # A code object of its own: the compiler remembers what it did by it, for other kernels too.
    own = FunctionType(step.__code__.replace(co_name="kernel"), globals(), "kernel", None, step.__closure__)
    (q, _, _), (_, k, v) = trial.draw(2, 1), trial.draw(2, 8)
    places = (torch.tensor([[3], [7]]), torch.arange(8)[None])
    with torch.no_grad():
        try:
            compiled = torch.compile(own, fullgraph=True, backend=collect)(q, k, v, *places)
        except Exception as error:
            yield f"one token, 8 keys: {_reason(str(error))}"
            return
        if len(graphs) != 1:
            yield f"one token, 8 keys: expected one graph, got {len(graphs)}"
        # The compiler takes an .item() into the graph without a word: on a GPU every step would wait for it.
        if any(node.target in ("item", "tolist") for graph in graphs for node in graph.graph.nodes):
            yield "one token, 8 keys: .item() or .tolist() looks at data within the graph"
        if wrong := _differs(compiled, trial.run((q, k, v), *places)):
            yield f"one token, 8 keys: compiled it {wrong}"


def _reason(message: str) -> str:
    """The compiler's first line, and the user's own that it is about."""
    first, *rest = [line.strip() for line in message.strip().splitlines()]
    for place, line in enumerate(rest):
        if line.startswith("from user code"):
            own = [line for line in rest[place + 1 :] if line and not line.startswith(("File ", "Set "))]
            return f"{first} ({own[-1]})" if own else first
    return first


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _apart(z: Tensor, expected: Tensor) -> float:
    """The RMS error of the worst query, over the RMS of all; NaN where something is not finite."""
    size = expected.double().square().mean().sqrt()
    error = (z.double() - expected.double()).square().mean(dim=-1).amax().sqrt()
    return (error / torch.where(size > 0, size, 1.0)).item()


def _differs(z: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """By how much, if by more than rounding; else empty."""
    apart = _apart(z, expected)
    return "" if apart <= CEILING[dtype] else f"differs by {apart:.1e} of its RMS"


def _sampled(T: int) -> list[int]:
    """All of a short text's tokens, some of a long one's."""
    return list(range(T)) if T <= 8 else [1, 2, T // 3, T - 2, T - 1]


CHECKS: dict[str, Callable[[Trial], Iterator[str]]] = {
    "shape": _shape,
    "pure": _pure,
    "causal": _causal,
    "cache": _cache,
    "chunks": _chunks,
    "batch": _batch,
    "padding": _padding,
    "groups": _groups,
    "dtype": _dtype,
    "finite": _finite,
    "gradient": _gradient,
    "compile": _compile,
}
