"""`sdpa`, compiled: an ordinary kernel that stands for `tinyllama.attention.sdpa`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, AttentionMask, sdpa
from tinyllama.config import LlamaConfig
from tinyllama.fast import build, native
from tinyllama.fast.claims import Claim
from tinyllama.rope import RotaryEmbedding


def compiled_sdpa(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Attention as `sdpa` computes it, in one pass over the keys and values.

    Compiled code serves causal attention on a CPU, where no gradient is wanted; `sdpa` serves the rest.
    """
    if (
        not context.mask.causal
        or not native.attends(q, k, v)
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or not claim(q.dtype).holds
    ):
        return sdpa(q, k, v, context)
    return native.attend(q, k, v, context.scale)


@cache
def claim(dtype: torch.dtype) -> Claim:
    """That compiled attention of that dtype is `sdpa`."""

    def trials() -> Iterator[tuple[object, ...]]:
        random = torch.Generator().manual_seed(0)
        rotary = RotaryEmbedding(LlamaConfig())
        # One token, a few after others, and a prompt; groups of 3, and of 1.
        for H, K, T, S in ((6, 2, 1, 70), (2, 2, 3, 5), (6, 2, native.FEW + 5, native.FEW + 5)):
            q, k, v = (torch.randn(1, n, t, 64, generator=random) for n, t in ((H, T), (K, S), (K, S)))
            keys = torch.arange(S)[None]
            mask = AttentionMask.of(keys[:, S - T :], keys, causal=True, rotary=rotary)
            context = AttentionContext(mask, 64**-0.5, 0, lambda x: x, lambda x: x)
            # Larger queries make a sharper softmax, in which a wrong key shows.
            yield (3 * q).to(dtype), k.to(dtype), v.to(dtype), context

    def compiled(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        return native.attend(q, k, v, context.scale)

    return Claim("attention runs", build.attention(dtype), trials, sdpa, compiled)
