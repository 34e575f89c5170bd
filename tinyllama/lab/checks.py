"""The clauses of the contract as properties: each check yields the examples that break it, smallest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, Kernel, Visibility
from tinyllama.config import LlamaConfig
from tinyllama.parity.measure import CEILING
from tinyllama.rope import RotaryEmbedding

# Rows and tokens. The last is longer than any window that one tries.
SIZES = [(1, 1), (1, 2), (1, 3), (2, 3), (1, 5), (2, 8), (1, 17), (1, 40), (1, 300)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of the output's RMS: a missing term of a gradient changes it by tens of percent, float32 by a thousandth.
GRADIENT_ERROR = 1e-2
STEP = 1e-4


@dataclass(frozen=True)
class Trial:
    """A kernel and the shape in which it is tried."""

    kernel: Kernel
    H: int
    K: int
    D: int
    layer: int

    def draw(self, B: int, T: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """Random q, k and v."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.H, self.K, self.K)
        return [torch.randn(B, n, T, self.D, generator=generator).to(dtype) for n in heads]

    def run(
        self, inputs: Sequence[Tensor], positions: Tensor, keys: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """The kernel's output for q, k, v at these positions, queries (B, T) and keys (B or 1, S)."""
        visible = Visibility.of(positions, positions if keys is None else keys, causal, self.rotary)
        context = AttentionContext(visible, self.D**-0.5, self.layer, lambda x: x, lambda x: x)
        q, k, v = inputs
        return self.kernel(q, k, v, context)

    def full(self, inputs: Sequence[Tensor], causal: bool = True) -> Tensor:
        """That for whole texts."""
        B, _, T, _ = inputs[0].shape
        return self.run(inputs, torch.arange(T).expand(B, -1), causal=causal)

    @property
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
        inputs = trial.draw(B, T)
        copies = [x.clone() for x in inputs]
        z = trial.full(inputs).clone()
        for name, x, copy in zip("qkv", inputs, copies, strict=True):
            if not torch.equal(x, copy):
                yield f"T={T}: {name} is changed in place; in a cache it would stay changed"
        if not torch.equal(trial.full(copies), z):
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
        inputs, others = trial.draw(3, T), trial.draw(3, T, seed=1)
        z = trial.full(inputs)
        for row in range(3):
            alone = trial.full([x[row : row + 1] for x in inputs])
            if wrong := _differs(z[row : row + 1], alone):
                yield f"T={T}: row {row} of 3 {wrong} from that row alone"
        mixed = trial.full([torch.cat((x[:1], y[1:])) for x, y in zip(inputs, others, strict=True)])
        if wrong := _differs(mixed[:1], z[:1]):
            yield f"T={T}: row 0 {wrong} when the other rows do"


def _padding(trial: Trial) -> Iterator[str]:
    for _, T in SIZES:
        for pad in (1, 3, 64):
            inputs = trial.draw(1, T)
            z = trial.full(inputs)
            # Beside a row without padding; what stands in the padding is large.
            long, filler = trial.draw(1, T + pad, seed=1), trial.draw(1, pad, seed=2)
            padded = [torch.cat((1e3 * f, x), dim=2) for f, x in zip(filler, inputs, strict=True)]
            rows = [torch.cat((x, y)) for x, y in zip(padded, long, strict=True)]
            count = torch.arange(T + pad)
            positions = torch.stack(((count - pad).clamp(min=-1), count))
            if wrong := _differs(trial.run(rows, positions)[:1, :, pad:], z):
                yield f"T={T}: after {pad} of padding it {wrong}"
            # The same into a cache: a token is in the slot of its position, padding in none.
            keys, values = (
                torch.cat((x, 1e3 * f), dim=2) for x, f in zip(inputs[1:], filler[1:], strict=True)
            )
            k = torch.cat((keys, long[1]))
            v = torch.cat((values, long[2]))
            if wrong := _differs(trial.run((rows[0], k, v), positions, count[None])[:1, :, pad:], z):
                yield f"T={T}: after {pad} of padding, into a cache, it {wrong}"


def _groups(trial: Trial) -> Iterator[str]:
    G = trial.H // trial.K
    for B, T in SIZES:
        q, k, v = trial.draw(B, T)
        z = trial.full((q, k, v))
        repeated = trial.full((q, k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)))
        if wrong := _differs(z, repeated):
            yield f"T={T}, H={trial.H}, K={trial.K}: it {wrong} from that with KV heads repeated {G} times"


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
        gradients = _gradients(trial.full(inputs), weights, inputs)
        for n, name in enumerate("qkv"):
            analytic, numeric = [], []
            for seed in range(3):
                direction = trial.draw(B, T, torch.float64, seed=2 + seed)[n]
                with torch.no_grad():
                    ahead, behind = (
                        trial.full([x + sign * STEP * direction if x is inputs[n] else x for x in inputs])
                        for sign in (1, -1)
                    )
                numeric.append(((ahead - behind) * weights).sum().item() / (2 * STEP))
                analytic.append((gradients[n] * direction).sum().item())
            error = (torch.tensor(analytic) - torch.tensor(numeric)).square().mean().sqrt()
            size = torch.tensor(numeric).square().mean().sqrt() + weights.numel() ** 0.5 * 0.1
            if not error <= GRADIENT_ERROR * size:
                yield f"T={T}: along {name} it changes by {numeric[0]:.2e}, by its gradient {analytic[0]:.2e}"
        positions = (torch.arange(T) - 1).clamp(min=-1).expand(B, -1)
        for name, gradient in zip(
            "qkv", _gradients(trial.run(inputs, positions), weights, inputs), strict=True
        ):
            if not gradient.isfinite().all():
                yield f"T={T}: with 1 of padding the gradient of {name} is not finite"


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
            yield f"one token, 8 keys: {str(error).strip().splitlines()[0]}"
            return
        if len(graphs) != 1:
            yield f"one token, 8 keys: expected one graph, got {len(graphs)}"
        if wrong := _differs(compiled, trial.run((q, k, v), *places)):
            yield f"one token, 8 keys: compiled it {wrong}"


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
