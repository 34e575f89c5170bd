"""What grouped-query attention saves: the cache and the attention of a step with H, K and one KV heads."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, AttentionMask
from tinyllama.bench.limits import timed
from tinyllama.config import LlamaConfig
from tinyllama.fast import native
from tinyllama.fast.fused import FusedAttention
from tinyllama.model import Llama

Figures = dict[str, Any]


@torch.inference_mode()
def sharing(model: Llama, context: int, step: float, rounds: int) -> list[Figures]:
    """Time the model's own kernel on the shapes that other numbers of KV heads give, in turn.

    Args:
        model: its kernel, query heads and layers.
        context: keys that each query looks at.
        step: seconds of the model's own step there.
        rounds: that count.

    Returns:
        For H KV heads (multi-head attention), the model's own number (grouped) and one (multi-query): `bytes`
        that are cached for each token and `cache` at the context, `seconds` of the attention of all layers,
        and `share` of a step that differs in nothing else.
    """
    config, weight = model.config, model.embed_tokens.weight
    H, K, D, L = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.num_hidden_layers,
    )
    dtype = model.new_cache(1, 1).keys.dtype
    actions = {
        heads: attention(model, heads, context, dtype, weight.device) for heads in sorted({H, K, 1})[::-1]
    }
    taken: dict[int, list[float]] = {heads: [] for heads in actions}
    for _ in range(rounds + 1):  # the first warms up
        for heads, action in actions.items():
            taken[heads].append(timed(action, weight.device))
    seconds = {heads: median(values[1:]) for heads, values in taken.items()}
    rows = []
    for heads, own in seconds.items():
        token = 2 * L * heads * D * dtype.itemsize
        whole = max(step - seconds[K], 0.0) + own
        rows.append(
            {
                "heads": heads,
                "name": " and ".join(_kinds(heads, H, K)),
                "bytes": token,
                "cache": token * context,
                "seconds": own,
                "share": own / whole,
            }
        )
    return rows


def _kinds(heads: int, H: int, K: int) -> list[str]:
    kinds = {"MHA": heads == H, "MQA": heads == 1}
    named = [name for name, fits in kinds.items() if fits] or ["GQA"]
    return [*named, "this model's"] if heads == K else named


def attention(
    model: Llama, heads: int, context: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """One query's attention in every layer, each with its own keys and values, which come from memory."""
    config, D = model.config, model.config.head_dim
    if all(isinstance(layer, FusedAttention) for layer in model.attentions):
        return _fused(config, heads, context, dtype)
    last = torch.tensor([[context - 1]], device=device)
    keys = torch.arange(context, device=device)[None]
    mask = AttentionMask.of(last, keys, causal=False, rotary=model.rotary, full=True)
    q = torch.randn(1, config.num_attention_heads, 1, D, device=device).to(dtype)
    shape = (config.num_hidden_layers, 1, heads, context, D)
    k, v = (torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2))

    def action() -> list[Tensor]:
        return [
            layer.kernel(q, k[n], v[n], AttentionContext(mask, D**-0.5, n, lambda x: x, lambda x: x))
            for n, layer in enumerate(model.attentions)
        ]

    return action


def _fused(config: LlamaConfig, heads: int, context: int, dtype: torch.dtype) -> Callable[[], object]:
    """The same by compiled code, RoPE and the cache's write included."""
    H, D, L = config.num_attention_heads, config.head_dim, config.num_hidden_layers
    position = torch.tensor([[context - 1]])
    q, k, v = (torch.randn(1, 1, count * D).to(dtype) for count in (H, heads, heads))
    cos, sin = (torch.randn(1, 1, 1, D // 2).to(dtype) for _ in range(2))
    keys, values = (torch.empty(L, 1, heads, context, D, dtype=dtype).normal_() for _ in range(2))

    def action() -> list[Tensor]:
        return [native.attend(q, k, v, cos, sin, position, keys[n], values[n]) for n in range(L)]

    return action
