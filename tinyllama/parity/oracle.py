"""A float64 Llama that shares no code with the model: the truth that all other passes are judged by.

It is written for clarity from the papers' equations, one text and one head at a time. Where there is a choice
it differs from the model: RoPE is a complex product, softmax its definition, KV heads are found by index. It
reads one weight at a time, so a billion parameters need little memory in float64. It is differentiable in
weights that are already float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def oracle_logits(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    ids: Sequence[int],
    trace: dict[str, Tensor | None] | None = None,
) -> Tensor:
    """Logits of every position of one text.

    Args:
        config: the fields of config.json, in transformers 4's spelling.
        weights: under checkpoint names less `model.`, in the dtype under test, because rounding the weights
            is not the model's error.
        ids: the text, T ids from position 0.
        trace: its keys are addresses (`layers.3`, `layers.3.self_attn.q_rot`; see `tinyllama.parity.trace`);
            each gets the value there, without a batch axis, or stays as it is where there is no such address.

    Returns:
        (T, V) in float64.
    """
    trace = {} if trace is None else trace
    eps = config["rms_norm_eps"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    device = weights["embed_tokens.weight"].device
    turns = _turns(config, len(ids), device)

    def weight(name: str) -> Tensor:
        return weights[name + ".weight"].to(torch.float64)

    def note(address: str, value: Tensor) -> Tensor:
        if address in trace:
            trace[address] = value
        return value

    def norm(address: str, x: Tensor) -> Tensor:
        return note(address, _rms_norm(x, weight(address), eps))

    def times(address: str, x: Tensor) -> Tensor:
        return note(address, x @ weight(address).T)

    def block(x: Tensor, at: str) -> Tensor:
        h = norm(at + "input_layernorm", x)
        q, k, v = (times(f"{at}self_attn.{name}_proj", h) for name in "qkv")
        z = _attention(q, k, v, heads, kv_heads, turns, at + "self_attn.", trace)
        x = x + times(at + "self_attn.o_proj", z)
        h = norm(at + "post_attention_layernorm", x)
        gate, up = times(at + "mlp.gate_proj", h), times(at + "mlp.up_proj", h)
        product = note(at + "mlp.product", gate / (1 + torch.exp(-gate)) * up)
        return x + times(at + "mlp.down_proj", product)

    x = note("embed_tokens", weights["embed_tokens.weight"][list(ids)].to(torch.float64))
    for layer in range(config["num_hidden_layers"]):
        x = note(f"layers.{layer}", block(x, f"layers.{layer}."))
    x = norm("norm", x)
    tied = config.get("tie_word_embeddings", False)
    return note("lm_head", x @ weight("embed_tokens" if tied else "lm_head").T)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Row over its root mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps) * weight


def _turns(config: Mapping[str, Any], length: int, device: torch.device) -> Tensor:
    """The unit complex numbers e^(i * position * frequency), (T, D/2)."""
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * rope_frequencies(config).to(device)
    return torch.polar(torch.ones_like(angles), angles)


def rope_frequencies(config: Mapping[str, Any]) -> Tensor:
    """Radians per position of each dimension pair, (D/2,) in float64."""
    D = config["head_dim"]
    frequencies = [config["rope_theta"] ** (-2 * pair / D) for pair in range(D // 2)]
    if config.get("rope_scaling"):
        frequencies = [_stretched(frequency, config["rope_scaling"]) for frequency in frequencies]
    return torch.tensor(frequencies, dtype=torch.float64)


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


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    turns: Tensor,
    at: str,
    trace: dict[str, Tensor | None],
) -> Tensor:
    """Each query head with the KV head of its group; (T, H*D), (T, K*D), (T, K*D) -> (T, H*D)."""
    T, D = q.shape[0], q.shape[1] // heads
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(diagonal=1)
    # Per head, and only where asked for: the scores of all heads of a long text fill gigabytes.
    seen: dict[str, list[Tensor]] = {
        name: [] for name in ("q_rot", "k_rot", "scores", "pattern", "z") if at + name in trace
    }

    def note(name: str, value: Tensor) -> Tensor:
        if name in seen:
            seen[name].append(value)
        return value

    keys = [note("k_rot", _turn(k[:, head * D : (head + 1) * D], turns)) for head in range(kv_heads)]
    outputs = []
    for head in range(heads):
        served_by = head * kv_heads // heads
        query = note("q_rot", _turn(q[:, head * D : (head + 1) * D], turns))
        scores = note("scores", (query @ keys[served_by].T / math.sqrt(D)).masked_fill(future, -math.inf))
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        weights = note("pattern", weights / weights.sum(dim=1, keepdim=True))
        outputs.append(note("z", weights @ v[:, served_by * D : (served_by + 1) * D]))
    trace.update({at + name: torch.stack(values) for name, values in seen.items()})
    return torch.cat(outputs, dim=1)
