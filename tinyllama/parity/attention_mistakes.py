"""Well-known mistakes between q, k, v and the heads' outputs, each as a formula: RoPE, heads, scale, mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.parity.scene import Scene, Suspects, rounded, short


def rope(scene: Scene) -> Suspects:
    """Queries or keys after RoPE (Su et al. 2021), (heads, T, D)."""
    x = scene.heads(f"self_attn.{scene.name[0]}_proj")  # (heads, T, D)
    T, D = x.shape[1:]
    theta, scaling = scene.config["rope_theta"], scene.config.get("rope_scaling")
    positions = torch.arange(T, dtype=torch.float64, device=x.device)
    pairs = torch.arange(D // 2, dtype=torch.float64, device=x.device)

    def frequencies(theta: float, scaled: bool = True) -> Tensor:
        plain = theta ** (-2 * pairs / D)
        if not (scaled and scaling):
            return plain
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
        share = ((waves - low) / (high - low)).clamp(0, 1)
        return plain * (share + (1 - share) / scaling["factor"])

    def turn(angles: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    angles = positions[:, None] * frequencies(theta)  # (T, D/2)
    yield "", turn(angles)
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    yield (
        "RoPE pairing is interleaved: 2i with 2i + 1, as in Meta's files",
        torch.stack(turned, -1).flatten(-2),
    )
    yield "RoPE is not applied", x
    yield "RoPE turns the other way", turn(-angles)
    yield "positions start at 1 (which attention cannot see)", turn(angles + frequencies(theta))
    first, second = x.chunk(2, dim=-1)
    cos, sin = (f.repeat_interleave(2, dim=-1) for f in (angles.cos(), angles.sin()))
    mixed = x * cos + torch.cat((-second, first), dim=-1) * sin
    yield "cos and sin are laid out in interleaved pairs, but x is rotated by halves", mixed
    if scaling:
        yield "RoPE scaling is left out", turn(positions[:, None] * frequencies(theta, scaled=False))
    else:
        fitted = _fit_theta(x, scene.observed)
        if fitted is not None:
            yield f"theta is {fitted:g}, not {theta:g}", turn(positions[:, None] * frequencies(fitted))
    for dtype in (torch.bfloat16, torch.float16):
        low = positions.to(dtype)[:, None] * frequencies(theta).to(torch.float32).to(dtype)
        yield f"angles are computed in {short(dtype)}", turn(low.to(torch.float64))
        cos, sin = (f.to(torch.float64).repeat(1, 2) for f in (low.cos(), low.sin()))
        low_turn = x * cos + torch.cat((-second, first), dim=-1) * sin
        yield f"angles are computed in {short(dtype)}", low_turn


def _fit_theta(x: Tensor, observed: Tensor) -> float | None:
    """The theta by which position 1 is turned; x and observed are (heads, T, D)."""
    if x.shape[1] < 2 or x.shape[2] < 4:
        return None
    before, after = (torch.complex(*t[:, 1].chunk(2, dim=-1)) for t in (x, observed))
    turns = (after * before.conj()).sum(dim=0).angle()[1:]  # pair 0 turns by 1 whatever theta is
    pairs = torch.arange(1, len(turns) + 1, dtype=torch.float64, device=x.device)
    known = turns > 0
    # log(turn) = -2i/D log(theta), by least squares; a relative error is larger in a small turn.
    slope = -2 * pairs / x.shape[2]
    weight = (turns * known).square()
    size = (weight * slope.square()).sum().item()
    if size == 0:
        return None
    log_turns = torch.where(known, turns, 1.0).log()
    return float(f"{math.exp((weight * slope * log_turns).sum().item() / size):.5g}")


def _served(k: Tensor, heads: int, tiled: bool = False) -> Tensor:
    """Each query head's KV head: (K, T, D) -> (H, T, D)."""
    groups = heads // k.shape[0]
    return k.repeat(groups, 1, 1) if tiled else k.repeat_interleave(groups, dim=0)


def _triangle(T: int, leak: int = 0) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril(leak)


TILED = "KV heads are tiled (query head h reads KV head h mod K), not repeated"


def _scales(config: Mapping[str, Any]) -> dict[str, float]:
    C, D = config["hidden_size"], config["head_dim"]
    return {
        "1/sqrt(hidden_size)": C**-0.5,
        "1/head_dim": 1 / D,
        "1 (none)": 1.0,
        "1/hidden_size": 1 / C,
        "sqrt(head_dim)": D**0.5,
    }


def _masks(T: int) -> dict[str, Tensor]:
    return {
        "mask leaks one token": _triangle(T, 1),
        "nothing is masked: a token sees the future": torch.ones(T, T, dtype=torch.bool),
        "a token cannot see itself": _triangle(T, -1),
    }


def scores(scene: Scene) -> Suspects:
    """Scores before the softmax, (H, T, S), masked ones -inf."""
    q, k, observed = scene["self_attn.q_rot"], scene["self_attn.k_rot"], scene.observed
    H, T, right = q.shape[0], q.shape[1], scene.config["head_dim"] ** -0.5
    causal = _triangle(T).to(q.device)

    def masked(scale: float = right, tiled: bool = False, visible: Tensor = causal) -> Tensor:
        products = q @ _served(k, H, tiled).transpose(1, 2) * scale
        return products.masked_fill(~visible.to(q.device), -math.inf)

    yield "", masked()
    yield TILED, masked(tiled=True)
    for name, visible in _masks(T).items():
        yield name, masked(visible=visible)
    for name, scale in _scales(scene.config).items():
        yield f"scores are scaled by {name}, not by 1/sqrt(head_dim)", masked(scale)
    if observed.shape != (H, T, T):
        return
    products, seen = masked(1.0)[:, causal], observed[:, causal]
    fitted = float(f"{((products * seen).sum() / products.square().sum()).item():.4g}")
    yield f"scores are scaled by {fitted:g}, not by 1/sqrt(head_dim) = {right:g}", masked(fitted)
    visible = observed[0] != -math.inf
    yield _mask_in_words(visible), masked(visible=visible)


def _mask_in_words(visible: Tensor) -> str:
    """What a mask (T, T) shows that causality does not, or hides."""
    queries, keys = visible.nonzero(as_tuple=True)
    T = visible.shape[0]
    ahead, back = ((offset.max().item() if len(offset) else 0) for offset in (keys - queries, queries - keys))
    if ahead > 0:
        return f"mask leaks {ahead} tokens"
    if back < T - 1:
        return f"a token sees at most itself and the {back} before it"
    return (
        f"mask hides {(_triangle(T).to(visible.device) & ~visible).sum().item()} of {T * (T + 1) // 2} pairs"
    )


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1).nan_to_num()


def pattern(scene: Scene) -> Suspects:
    """Softmax of the scores, (H, T, S)."""
    scores = scene["self_attn.scores"]
    yield "", _softmax(scores)
    yield "softmax runs over the queries", scores.softmax(dim=-2).nan_to_num()
    yield "softmax is left out", scores.masked_fill(scores == -math.inf, 0)
    yield "softmax has 1 added to its denominator", _softmax(F.pad(scores, (0, 1)))[..., :-1]
    for dtype in (torch.bfloat16, torch.float16):
        yield f"the pattern is rounded to {short(dtype)}", rounded(_softmax(scores), dtype)
        yield f"softmax is computed in {short(dtype)}", rounded(_softmax(rounded(scores, dtype)), dtype)


def attended(scene: Scene) -> Suspects:
    """The heads' outputs from rotated q and k, (H, T, D): for kernels that show no scores."""
    q, k, v = scene["self_attn.q_rot"], scene["self_attn.k_rot"], scene.heads("self_attn.v_proj")
    H, T, right = q.shape[0], q.shape[1], scene.config["head_dim"] ** -0.5
    causal = _triangle(T)

    def z(
        scale: float = right, tiled: bool = False, v_tiled: bool = False, visible: Tensor = causal
    ) -> Tensor:
        scores = q @ _served(k, H, tiled).transpose(1, 2) * scale
        pattern = _softmax(scores.masked_fill(~visible.to(q.device), -math.inf))
        return pattern @ _served(v, H, v_tiled)

    yield "", z()
    yield TILED, z(tiled=True, v_tiled=True)
    yield TILED.replace("KV", "V"), z(v_tiled=True)
    for name, visible in _masks(T).items():
        yield name, z(visible=visible)
    for name, scale in _scales(scene.config).items():
        yield f"scores are scaled by {name}, not by 1/sqrt(head_dim)", z(scale)
