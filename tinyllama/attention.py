"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and its two kernels.

A kernel is a function of queries, keys, values and a context. To try another attention, write one and
assign it: `model.layers[3].self_attn.kernel = my_kernel`, or `model.set_attention(my_kernel)` for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.cache import KVCache
from tinyllama.config import LlamaConfig
from tinyllama.rope import RotaryEmbedding, rotate


@dataclass(frozen=True)
class AttentionMask:
    """Where queries and keys stand, and which keys each query may look at; the same for all layers of a pass.

    Attributes:
        allowed: (B, 1, T, S), True where the query may look at the key.
        query_positions: (B, T); -1 for padding.
        key_positions: (B or 1, S).
        causal: the T queries are the last T of the S keys in every row, and each sees all up to itself. Then
            `allowed` says nothing new, and a kernel may leave it out.
        rotary: cos and sin by which RoPE has turned queries and keys, for any positions; see `rotate`.
    """

    allowed: Tensor
    query_positions: Tensor
    key_positions: Tensor
    causal: bool
    rotary: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        queries: Tensor, keys: Tensor, causal: bool, rotary: RotaryEmbedding, window: int | None = None
    ) -> AttentionMask:
        """A query sees the keys at its own position and before; nothing sees padding (position -1).

        With a window it sees that many of them, the nearest ones (Mistral 7B v0.1, arXiv:2310.06825).
        """
        allowed = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
        if window is not None:
            allowed &= queries[:, :, None] - keys[:, None, :] < window
            causal = causal and keys.shape[1] <= window
        return AttentionMask(allowed[:, None], queries, keys, causal, rotary)

    def where(self, also: Tensor) -> AttentionMask:
        """Only the keys that `also` allows too: booleans that broadcast to (B, 1, T, S)."""
        return replace(self, allowed=self.allowed & also, causal=False)


@dataclass
class AttentionContext:
    """What a kernel may need beside queries, keys and values.

    Attributes:
        mask: which keys each query may look at.
        scale: 1/sqrt(D), the factor on the scores.
        layer: index of the layer.
        scores: a tap: pass the scores (B, H, T, S) through it and they can be read or replaced from outside.
        pattern: a tap for the attention pattern (B, H, T, S).
        heads: which query heads of the layer these are: all, unless several processes share them (parallel/).
        num_heads: how many query heads the layer has.
    """

    mask: AttentionMask
    scale: float
    layer: int
    scores: Callable[[Tensor], Tensor]
    pattern: Callable[[Tensor], Tensor]
    heads: range
    num_heads: int

    def where(self, also: Tensor) -> AttentionContext:
        """The same context with fewer keys to see; see `AttentionMask.where`."""
        return replace(self, mask=self.mask.where(also))

    def untapped(self) -> AttentionContext:
        """The same context without taps, for a value that is only a part of the scores or the pattern."""
        return replace(self, scores=lambda x: x, pattern=lambda x: x)


Kernel = Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, step by step (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    The order of operations is transformers' eager attention, so that float32 agrees to the bit.

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D); each KV head serves G = H/K query heads.
        v: (B, K, S, D).
        context: see AttentionContext.

    Returns:
        (B, H, T, D).
    """
    k, v = repeat_kv(q, k, v)  # (B, H, S, D)
    scores = q @ k.transpose(2, 3) * context.scale  # (B, H, T, S)
    return masked_softmax(scores, context) @ v


def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once for each query head: (B, K, S, D) -> (B, H, S, D)."""
    G = q.shape[1] // k.shape[1]
    return k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)


def masked_softmax(scores: Tensor, context: AttentionContext) -> Tensor:
    """The attention pattern of some scores: a softmax over the allowed keys; (B, H, T, S)."""
    # The lowest finite number, not -inf: a row that sees nothing (padding) stays finite.
    scores = context.scores(scores.masked_fill(~context.mask.allowed, torch.finfo(scores.dtype).min))
    # float32 at least: a bfloat16 sum over many keys loses the small ones.
    working = torch.promote_types(scores.dtype, torch.float32)
    return context.pattern(scores.softmax(dim=-1, dtype=working).to(scores.dtype))


def sdpa(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """The same function by PyTorch's `scaled_dot_product_attention`, which never stores scores or pattern.

    Arguments and result are those of `eager`.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if context.mask.causal and T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=context.scale, enable_gqa=True)
    # The G heads of a group become G rows of queries, so keys and values are never copied: with a mask,
    # enable_gqa decoded 3 to 20 times slower on a CPU.
    allowed = None
    if not context.mask.causal or T > 1:  # the last token of a row sees everything
        allowed = (
            context.mask.allowed[:, :, None].expand(-1, -1, H // K, -1, -1).flatten(2, 3)
        )  # (B, 1, G*T, S)
    z = F.scaled_dot_product_attention(q.reshape(B, K, -1, D), k, v, attn_mask=allowed, scale=context.scale)
    return z.reshape(B, H, T, D)


def check_result(z: Any, q: Tensor, kernel: Kernel) -> None:
    """Raise InputError unless a kernel's result has the queries' shape (B, H, T, D), dtype and device."""
    if not isinstance(z, Tensor) or z.shape != q.shape or z.dtype != q.dtype or z.device != q.device:
        from tinyllama.kernels import wrong_result  # here, because kernels.py imports this file

        raise wrong_result(z, q, kernel)


class Tap(nn.Identity):
    """A value with a name: a forward hook here reads it, or replaces it by what the hook returns."""


class Attention(nn.Module):
    """Queries, keys and values from the residual stream, RoPE, the cache, a kernel, and the way back.

    Addresses within it: `q_proj`, `k_proj`, `v_proj` (before RoPE), `q_rot`, `k_rot` (after), `scores` and
    `pattern` (from kernels that have them), `z` (each head's output), `o_proj`.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = D
        self.heads, self.num_heads = range(H), H  # this process' query heads, and how many there are
        self.kernel: Kernel = sdpa
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_rot, self.k_rot = Tap(), Tap()
        self.scores, self.pattern, self.z = Tap(), Tap(), Tap()

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: AttentionMask, cache: KVCache | None
    ) -> Tensor:
        """Let each token gather from those it sees.

        Args:
            x: (B, T, C).
            rotation: cos and sin, each (B, 1, T, D).
            mask: which keys each query may look at.
            cache: where to keep this layer's keys and values; None attends to the T tokens alone.

        Returns:
            (B, T, C), to be added to the residual stream.
        """
        q = self.split_heads(self.q_proj(x))  # (B, H, T, D)
        k = self.split_heads(self.k_proj(x))  # (B, K, T, D)
        v = self.split_heads(self.v_proj(x))  # (B, K, T, D)
        q, k = self.q_rot(rotate(q, *rotation)), self.k_rot(rotate(k, *rotation))
        if cache is not None:
            k, v = cache.write(self.layer, mask, k, v)  # (B, K, S, D)
        context = AttentionContext(
            mask, self.head_dim**-0.5, self.layer, self.scores, self.pattern, self.heads, self.num_heads
        )
        z = self.kernel(q, k, v, context)  # (B, H, T, D)
        check_result(z, q, self.kernel)
        return self.o_proj(self.z(z).transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) as (B, heads, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.head_dim).transpose(1, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        """nn.Module refuses a function where a kernel that is a module (one with weights) was before."""
        if name == "kernel":
            self._modules.pop("kernel", None)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The kernel's name, for print(model)."""
        from tinyllama.kernels import kernel_name  # here, because kernels.py imports this file

        return f"kernel={kernel_name(self.kernel)}"
