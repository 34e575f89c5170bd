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
    hidden = _hidden(config, len(ids)).to(device)

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
        z = _attention(q, k, v, heads, kv_heads, turns, hidden, at + "self_attn.", trace)
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
    """The complex numbers r e^(i * position * frequency), (T, D/2); r is 1 for all but YaRN."""
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * rope_frequencies(config, length).to(device)
    return torch.polar(torch.full_like(angles, rope_magnitude(config)), angles)


def rope_frequencies(config: Mapping[str, Any], length: int) -> Tensor:
    """Radians per position of each dimension pair, (D/2,) in float64, in a text of that length."""
    D, theta, scaling = config["head_dim"], config["rope_theta"], config.get("rope_scaling") or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    if kind == "dynamic":
        stretch = max(length / config["max_position_embeddings"], 1.0)
        theta *= (1 + factor * (stretch - 1)) ** (D / (D - 2))
    frequencies = [theta ** (-2 * pair / D) for pair in range(D // 2)]
    if kind == "linear":
        frequencies = [frequency / factor for frequency in frequencies]
    elif kind in ("llama3", "yarn"):
        kept = _kept_by_llama3 if kind == "llama3" else _kept_by_yarn
        shares = [kept(pair, frequency, config, scaling) for pair, frequency in enumerate(frequencies)]
        frequencies = [
            frequency * (share + (1 - share) / factor)
            for share, frequency in zip(shares, frequencies, strict=True)
        ]
    return torch.tensor(frequencies, dtype=torch.float64)


def _kept_by_llama3(
    pair: int, frequency: float, config: Mapping[str, Any], scaling: Mapping[str, Any]
) -> float:
    """Which share of its speed a pair keeps: by how often its wave fits into the original context."""
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return min(max((waves - low) / (high - low), 0.0), 1.0)


def _kept_by_yarn(
    pair: int, frequency: float, config: Mapping[str, Any], scaling: Mapping[str, Any]
) -> float:
    """Which share of its speed a pair keeps: by its place between two pairs, of many turns and of few."""
    D, context = config["head_dim"], scaling["original_max_position_embeddings"]
    # The pair whose wave fits `turns` times: theta^(-2 pair / D) * context = 2 pi turns.
    many, few = (
        D / 2 * math.log(context / (2 * math.pi * turns), config["rope_theta"])
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    if scaling["truncate"]:
        many, few = math.floor(many), math.ceil(few)
    many, few = max(many, 0), min(few, D - 1)
    # Where both are one pair transformers puts 0.001 between them.
    return 1 - min(max((pair - many) / (few - many or 0.001), 0.0), 1.0)


def rope_magnitude(config: Mapping[str, Any]) -> float:
    """How much longer RoPE makes queries and keys: YaRN's paper, 0.1 ln(factor) + 1."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]
    growth = 0.1 * max(math.log(scaling["factor"]), 0.0)
    if scaling["mscale"] is None or scaling["mscale_all_dim"] is None:
        return growth + 1
    return (growth * scaling["mscale"] + 1) / (growth * scaling["mscale_all_dim"] + 1)


def _turn(head: Tensor, turns: Tensor) -> Tensor:
    """Multiply each pair (i, i + D/2) of a head (T, D), as a complex number, by its turn."""
    half = head.shape[1] // 2
    turned = torch.complex(head[:, :half], head[:, half:]) * turns
    return torch.cat((turned.real, turned.imag), dim=1)


def _hidden(config: Mapping[str, Any], length: int) -> Tensor:
    """(T, T), True where a query may not see a key: a later one, or one beyond a sliding window."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    return (back < 0) | (back >= (config.get("sliding_window") or length))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    turns: Tensor,
    hidden: Tensor,
    at: str,
    trace: dict[str, Tensor | None],
) -> Tensor:
    """Each query head with the KV head of its group; (T, H*D), (T, K*D), (T, K*D) -> (T, H*D)."""
    D = q.shape[1] // heads
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
        scores = note("scores", (query @ keys[served_by].T / math.sqrt(D)).masked_fill(hidden, -math.inf))
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        weights = note("pattern", weights / weights.sum(dim=1, keepdim=True))
        outputs.append(note("z", weights @ v[:, served_by * D : (served_by + 1) * D]))
    trace.update({at + name: torch.stack(values) for name, values in seen.items()})
    return torch.cat(outputs, dim=1)
