"""Other attentions, each a kernel in a few lines with its paper and equation: to try, and to start from.

Keyword arguments are settings: `functools.partial(window, size=64)`, or `window:size=64` on a command line.
The query's position is i, the key's is j. All variants stay causal: a query sees only keys with j <= i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.attention import AttentionContext, masked_softmax, repeat_kv, sdpa
from tinyllama.errors import InputError
from tinyllama.rope import rotate


def window(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, size: int = 256) -> Tensor:
    """Sliding window: a token sees itself and the `size` - 1 before it, i - j < size.

    Beltagy et al. 2020 (Longformer, arXiv:2004.05150), section 3.1; Jiang et al. 2023 (Mistral 7B,
    arXiv:2310.06825), section 2.
    """
    require(size >= 1, "window: size", "1 or more", size)
    return sdpa(q, k, v, context.where(_distance(context) < size))


def sinks(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, first: int = 4, size: int = 252
) -> Tensor:
    """Attention sinks: the window and the text's `first` tokens, i - j < size or j < first.

    Xiao et al. 2023 (StreamingLLM, arXiv:2309.17453), section 3.2. Positions are those of the text; the
    paper's are those within its rolling cache.
    """
    require(first >= 0, "sinks: first", "0 or more", first)
    require(size >= 1, "sinks: size", "1 or more", size)
    start = context.mask.key_positions[:, None, None, :] < first
    return sdpa(q, k, v, context.where(start | (_distance(context) < size)))


def alibi(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """ALiBi: instead of RoPE a penalty that grows with the distance, q k^T / sqrt(D) - m (i - j).

    Press et al. 2021 (arXiv:2108.12409), section 3. Head h of H has the slope m = 2^(-8h/H), h from 1. If H
    is no power of two, every second slope of the next power is added, as in the authors' code.
    """
    H = context.num_heads
    power = 1 << (H.bit_length() - 1)
    exponents = [8 * h / power for h in range(1, power + 1)] + [4 * h / power for h in range(1, 2 * power, 2)]
    own = [2 ** -exponents[head] for head in context.heads]
    slopes = torch.tensor(own, dtype=q.dtype, device=q.device)[:, None, None]
    q = without_rope(q, context.mask.query_positions, context)
    k = without_rope(k, context.mask.key_positions, context)
    k, v = repeat_kv(q, k, v)
    scores = q @ k.transpose(2, 3) * context.scale - slopes * _distance(context)
    return masked_softmax(scores, context) @ v


def no_positions(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """NoPE: attention without RoPE; only the causal mask tells the order of the tokens.

    Kazemnejad et al. 2023 (arXiv:2305.19466). Some models use it in every fourth layer: `--layers 3,7,11`.
    """
    q = without_rope(q, context.mask.query_positions, context)
    k = without_rope(k, context.mask.key_positions, context)
    return sdpa(q, k, v, context)


def softcap(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, cap: float = 50.0) -> Tensor:
    """Soft-capping: scores stay within +-cap, cap * tanh(scores / cap).

    Gemma Team 2024 (Gemma 2, arXiv:2408.00118), section 2, with their cap of 50.
    """
    require(cap > 0, "softcap: cap", "a number above 0", cap)
    k, v = repeat_kv(q, k, v)
    scores = q @ k.transpose(2, 3) * context.scale
    return masked_softmax(cap * torch.tanh(scores / cap), context) @ v


def linear(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Linear attention: phi(q) phi(k)^T, each row divided by its sum, with phi(x) = elu(x) + 1.

    Katharopoulos et al. 2020 (arXiv:2006.16236), equations 5 to 9. This quadratic form needs all keys; a
    running D x D state gives the same numbers.
    """
    k, v = repeat_kv(q, k, v)
    # float32 at least: sums of many positive products overflow float16.
    working = torch.promote_types(q.dtype, torch.float32)
    phi_q, phi_k = F.elu(q.to(working)) + 1, F.elu(k.to(working)) + 1
    weights = context.scores((phi_q @ phi_k.transpose(2, 3)).masked_fill(~context.mask.allowed, 0.0))
    total = weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(working).tiny)
    return context.pattern((weights / total).to(q.dtype)) @ v


def differential(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Differential attention: (softmax(q1 k1^T / sqrt(d)) - lambda softmax(q2 k2^T / sqrt(d))) v, d = D/2.

    Ye et al. 2024 (arXiv:2410.05258), equations 1 to 3, with lambda fixed at the layer's initial value,
    0.8 - 0.6 exp(-0.3 layer). Each half of a head needs whole RoPE pairs, n with n + D/2.
    """
    require(q.shape[-1] % 4 == 0, "differential: head_dim", "a multiple of 4", q.shape[-1])
    start = 0.8 - 0.6 * math.exp(-0.3 * context.layer)
    k, v = repeat_kv(q, k, v)
    first, second = (
        masked_softmax(q_half @ k_half.transpose(2, 3) * q_half.shape[-1] ** -0.5, context.untapped())
        for q_half, k_half in zip(_halves(q), _halves(k), strict=True)
    )
    z = context.pattern(first - start * second) @ v
    return (1 - start) * F.rms_norm(z, z.shape[-1:], eps=1e-5)


def topk(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, keys: int = 32) -> Tensor:
    """Sparse attention: a softmax over only the `keys` largest scores of each query.

    Gupta et al. 2021 (arXiv:2106.06899), section 3. Scores equal to the smallest one kept are kept too.
    """
    require(keys >= 1, "topk: keys", "1 or more", keys)
    k, v = repeat_kv(q, k, v)
    scores = q @ k.transpose(2, 3) * context.scale
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~context.mask.allowed, lowest)  # invisible keys must not be among the largest
    kth = scores.topk(min(keys, scores.shape[-1]), dim=-1).values[..., -1:]
    return masked_softmax(scores.masked_fill(scores < kth, lowest), context) @ v


def ablate(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """No attention: z = 0. For one head at a time: `--layers 3 --heads 0`.

    Michel et al. 2019 (Are sixteen heads really better than one?, arXiv:1905.10650), equation 2 with xi = 0.
    """
    return torch.zeros_like(q)


def without_rope(x: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
    """Queries or keys at those positions, as they were before RoPE: rotated back."""
    cos, sin = context.mask.rotary(positions, x.dtype)
    # Divided by their squared length, which only YaRN's have: it makes queries and keys longer as well.
    return rotate(x, cos, -sin) / (cos.square() + sin.square())


def require(kept: bool, what: str, expected: str, got: float) -> None:
    """Raise InputError about a setting unless it is as a kernel needs it."""
    if not kept:
        raise InputError(f"{what}: expected {expected}, got {got}")


def _distance(context: AttentionContext) -> Tensor:
    """How far back each key is, i - j: (B, 1, T, S)."""
    mask = context.mask
    return mask.query_positions[:, None, :, None] - mask.key_positions[:, None, None, :]


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """(B, H, T, D) as two halves (B, H, T, D/2), each with whole RoPE pairs in RoPE's layout."""
    pairs = x.unflatten(-1, (2, 2, -1))  # which of a RoPE pair, which half, D/4
    return pairs.transpose(-3, -2).flatten(-2).unbind(-2)
