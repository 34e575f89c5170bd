"""Attentions that keep less of each token: fewer KV heads, or fewer bits. `keeps` counts their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, sdpa
from tinyllama.lab.clauses import breaks
from tinyllama.lab.keeping import keeps
from tinyllama.lab.variants import require


def averaged_heads(
    k: Tensor, v: Tensor, context: AttentionContext, *, kv_heads: int = 1
) -> tuple[Tensor, Tensor]:
    """Keys and values of another number of heads: neighbours' means, or each repeated."""
    K = k.shape[1]
    fits = kv_heads >= 1 and max(K, kv_heads) % min(K, kv_heads) == 0
    require(fits, "regroup: kv_heads", f"a divisor or a multiple of {K}", kv_heads)
    if kv_heads < K:
        k, v = (x.unflatten(1, (kv_heads, -1)).mean(dim=2) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(kv_heads // K, dim=1) for x in (k, v))
    return k, v


# A query head reads a mean of KV heads, not its own.
@breaks("groups")
@keeps(averaged_heads)
def regroup(
    q: Tensor, kept: tuple[Tensor, Tensor], context: AttentionContext, *, kv_heads: int = 1
) -> Tensor:
    """Another number of KV heads: neighbours are averaged (1: MQA), or each is repeated (H: MHA).

    Ainslie et al. 2023 (GQA, arXiv:2305.13245), section 2.1. RoPE is linear, so the mean of the keys is the
    key of the mean projection: a checkpoint with averaged weights computes the same, from a smaller cache.
    """
    H = q.shape[1]
    require(H % kv_heads == 0, "regroup: kv_heads", f"a divisor of {H}", kv_heads)
    return sdpa(q, *kept, context)


def codes(k: Tensor, v: Tensor, context: AttentionContext, *, bits: int = 4) -> tuple[Tensor, ...]:
    """Keys and values as whole numbers of 2, 4 or 8 bits, with each head's scale and lowest value."""
    require(bits in (2, 4, 8), "quantised: bits", "2, 4 or 8", bits)
    require(k.shape[-1] * bits % 8 == 0, "quantised: head_dim", f"a multiple of {8 // bits}", k.shape[-1])
    return *_packed(k, bits), *_packed(v, bits)


# Rounding is flat: its slope is 0, and the gradient stops there.
@breaks("gradient")
@keeps(codes)
def quantised(q: Tensor, kept: tuple[Tensor, ...], context: AttentionContext, *, bits: int = 4) -> Tensor:
    """A cache in few bits: each token's key and value are rounded to 2^bits steps between their ends.

    As Liu et al. 2024 (KIVI, arXiv:2402.02750), section 3.1, for values; theirs takes keys by channel.
    """
    k, v = (_unpacked(parts, bits).to(q.dtype) for parts in (kept[:3], kept[3:]))
    return sdpa(q, k, v, context)


def _packed(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, S, D) as bytes (B, K, S, D * bits / 8), scales and lowest values (B, K, S, 1)."""
    in_a_byte = 8 // bits
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    low = low.to(torch.float16)
    scale = ((high - low) / (2**bits - 1)).to(torch.float16)
    # A head whose numbers are all the same has a scale of 0.
    steps = torch.where(scale > 0, (x - low) / scale.to(x.dtype), 0.0).round().clamp(0, 2**bits - 1)
    places = bits * torch.arange(in_a_byte, device=x.device, dtype=torch.uint8)
    grouped = steps.to(torch.uint8).unflatten(-1, (-1, in_a_byte)) << places
    return grouped.sum(dim=-1, dtype=torch.uint8), scale, low


def _unpacked(parts: tuple[Tensor, ...], bits: int) -> Tensor:
    """What `_packed` kept, in float32: (B, K, S, D)."""
    packed, scale, low = parts
    places = bits * torch.arange(8 // bits, device=packed.device, dtype=torch.uint8)
    steps = ((packed[..., None] >> places) & (2**bits - 1)).flatten(-2)
    return steps * scale.float() + low.float()
