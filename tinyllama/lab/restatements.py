"""The same attention computed in other ways: each has to pass parity with the textbook's."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, repeat_kv
from tinyllama.errors import InputError
from tinyllama.lab.clauses import breaks


def loops(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """One query at a time: z_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j, over the visible j.

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1 in plain loops. Slow.
    """
    B, H, T, _ = q.shape
    G = H // k.shape[1]
    mask = context.mask.allowed.expand(B, 1, T, -1)
    z = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // G], v[b, h // G]  # (S, D)
            for i in range(T):
                scores = (keys @ q[b, h, i] * context.scale).float()  # (S,)
                scores = scores.masked_fill(~mask[b, 0, i], torch.finfo(scores.dtype).min)
                z[b, h, i] = scores.softmax(dim=0).to(q.dtype) @ values
    return z


def online(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, block: int = 64) -> Tensor:
    """The softmax in one pass over blocks of keys: never more than T x block scores in memory.

    Milakov & Gimelshein 2018 (arXiv:1805.02867), algorithm 3; Dao et al. 2022 (FlashAttention,
    arXiv:2205.14135), algorithm 1. Kept so far: the largest score m, the sum of weights, and the sum of
    weighted values z. A block with a larger score m' first multiplies both sums by exp(m - m').
    """
    if block < 1:
        raise InputError(f"online: block: expected 1 or more, got {block}")
    k, v = repeat_kv(q, k, v)
    working = torch.promote_types(q.dtype, torch.float32)
    lowest = torch.finfo(working).min
    m = torch.full_like(q[..., :1], lowest, dtype=working)
    total, z = torch.zeros_like(m), torch.zeros_like(q, dtype=working)
    for start in range(0, k.shape[2], block):
        keys, values = k[:, :, start : start + block], v[:, :, start : start + block].to(working)
        allowed = context.mask.allowed[..., start : start + block]
        scores = (q @ keys.transpose(2, 3) * context.scale).to(working).masked_fill(~allowed, lowest)
        larger = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - larger).exp(), (m - larger).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        z = z * shrink + weights @ values
        m = larger
    return (z / total).to(q.dtype)


# PyTorch has no backward pass for it on a CPU.
@breaks("gradient")
def flex(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """PyTorch's flex_attention: the variant is a function of one score and its indices.

    Dong et al. 2024 (FlexAttention, arXiv:2412.05496). It is slow unless it is compiled.
    """
    from torch.nn.attention.flex_attention import flex_attention

    mask = context.mask.allowed.expand(q.shape[0], 1, -1, -1)

    def visible(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(mask[b, 0, i, j], score, -torch.inf)

    z: Tensor = flex_attention(q, k, v, score_mod=visible, scale=context.scale, enable_gqa=True)
    return z
