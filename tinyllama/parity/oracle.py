"""A float64 Llama that shares no code with the model: the truth that float32 and 16-bit passes are judged by.

It is written for clarity from the papers' equations, one text and one head at a time, and in other terms than
the model where there is a choice: RoPE as a complex product, softmax by its definition, KV heads by index. It
streams one weight at a time, so that a billion parameters need little memory in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def oracle_logits(config: Mapping[str, Any], weights: Mapping[str, Tensor], ids: Sequence[int]) -> Tensor:
    """Logits of every position of one text.

    Args:
        config: the fields of config.json, in transformers 4's spelling.
        weights: under checkpoint names less `model.`, in the dtype under test: rounding the weights is not
            the model's error.
        ids: the text, T ids from position 0.

    Returns:
        (T, V) in float64.
    """
    eps = config["rms_norm_eps"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    turns = _turns(config, len(ids))

    def weight(name: str) -> Tensor:
        return weights[name].to(torch.float64)

    x = weights["embed_tokens.weight"][list(ids)].to(torch.float64)
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        h = _rms_norm(x, weight(at + "input_layernorm.weight"), eps)
        q = h @ weight(at + "self_attn.q_proj.weight").T
        k = h @ weight(at + "self_attn.k_proj.weight").T
        v = h @ weight(at + "self_attn.v_proj.weight").T
        z = _attention(q, k, v, heads, kv_heads, turns)
        x = x + z @ weight(at + "self_attn.o_proj.weight").T
        h = _rms_norm(x, weight(at + "post_attention_layernorm.weight"), eps)
        gate = h @ weight(at + "mlp.gate_proj.weight").T
        up = h @ weight(at + "mlp.up_proj.weight").T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weight(at + "mlp.down_proj.weight").T
    x = _rms_norm(x, weight("norm.weight"), eps)
    tied = config.get("tie_word_embeddings", False)
    return x @ weight("embed_tokens.weight" if tied else "lm_head.weight").T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Row over its root mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps) * weight


def _turns(config: Mapping[str, Any], length: int) -> Tensor:
    """The unit complex numbers e^(i * position * frequency), (T, D/2)."""
    D = config["head_dim"]
    frequencies = [config["rope_theta"] ** (-2 * pair / D) for pair in range(D // 2)]
    if config.get("rope_scaling"):
        frequencies = [_stretched(frequency, config["rope_scaling"]) for frequency in frequencies]
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(
        frequencies, dtype=torch.float64
    )
    return torch.polar(torch.ones_like(angles), angles)


def _stretched(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Llama 3.1's rule, by how often the wave fits into the original context."""
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = min(max((waves - low) / (high - low), 0.0), 1.0)
    return frequency * (share + (1 - share) / scaling["factor"])


def _turn(head: Tensor, turns: Tensor) -> Tensor:
    """Multiply each pair (i, i + D/2) of a head (T, D), as a complex number, by its turn."""
    half = head.shape[1] // 2
    turned = torch.complex(head[:, :half], head[:, half:]) * turns
    return torch.cat((turned.real, turned.imag), dim=1)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, turns: Tensor) -> Tensor:
    """Each query head with the KV head of its group; (T, H*D), (T, K*D), (T, K*D) -> (T, H*D)."""
    T, D = q.shape[0], q.shape[1] // heads
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    outputs = []
    for head in range(heads):
        served_by = head * kv_heads // heads
        query = _turn(q[:, head * D : (head + 1) * D], turns)
        key = _turn(k[:, served_by * D : (served_by + 1) * D], turns)
        scores = query @ key.T / math.sqrt(D)
        scores[future] = -math.inf
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        weights = weights / weights.sum(dim=1, keepdim=True)
        outputs.append(weights @ v[:, served_by * D : (served_by + 1) * D])
    return torch.cat(outputs, dim=1)
