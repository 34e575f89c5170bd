"""Well-known mistakes between q, k, v and the heads' outputs, each as a formula: RoPE, heads, scale, mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.parity.oracle import rope_frequencies, rope_magnitude
from tinyllama.parity.scene import Scene, Suspects, rounded, short


def rope(scene: Scene) -> Suspects:
    """Queries or keys after RoPE (Su et al. 2021), (heads, T, D)."""
    x = scene.heads(f"self_attn.{scene.name[0]}_proj")  # (heads, T, D)
    first, second = x.chunk(2, dim=-1)
    theta = scene.config["rope_theta"]
    positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None]

    def frequencies(**changes: float | None) -> Tensor:
        return rope_frequencies({**scene.config, **changes}, x.shape[1]).to(x.device)

    magnitude = rope_magnitude(scene.config)

    def turn(angles: Tensor, magnitude: float = magnitude) -> Tensor:
        return rotated(angles.cos() * magnitude, angles.sin() * magnitude)

    def rotated(cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    angles = positions * frequencies()  # (T, D/2)
    yield "", turn(angles)
    a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos() * magnitude, angles.sin() * magnitude
    interleaved = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    yield "RoPE pairing is interleaved: 2i with 2i + 1, as in Meta's files", interleaved
    yield "RoPE is not applied", x
    yield "RoPE turns the other way", turn(-angles)
    yield "positions start at 1 (which attention cannot see)", turn(angles + frequencies())
    cos, sin = (f.repeat_interleave(2, dim=-1) for f in (cos, sin))
    mixed = x * cos + torch.cat((-second, first), dim=-1) * sin
    yield "cos and sin are laid out in interleaved pairs, but x is rotated by halves", mixed
    if scene.config.get("rope_scaling"):
        yield "RoPE scaling is left out", turn(positions * frequencies(rope_scaling=None), 1.0)
        if magnitude != 1:
            yield "YaRN's factor on cos and sin is left out", turn(angles, 1.0)
    elif fitted := _fit_theta(x, scene.observed):
        yield f"theta is {fitted:g}, not {theta:g}", turn(positions * frequencies(rope_theta=fitted))
    for dtype in (torch.bfloat16, torch.float16):
        low = positions.to(dtype) * frequencies().to(torch.float32).to(dtype)
        yield f"angles are computed in {short(dtype)}", turn(low.to(torch.float64))
        cos, sin = (f.to(torch.float64) * magnitude for f in (low.cos(), low.sin()))
        yield f"angles are computed in {short(dtype)}", rotated(cos, sin)


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


def _scored(scene: Scene) -> Suspects:
    """Scores before the softmax from rotated q and k, (H, T, S), masked ones -inf."""
    q, k = scene["self_attn.q_rot"], scene["self_attn.k_rot"]
    H, T, _ = q.shape
    C, D = scene.config["hidden_size"], scene.config["head_dim"]

    window = scene.config.get("sliding_window") or T

    def masked(scale: float = D**-0.5, tiled: bool = False, leak: int = 0, window: int = window) -> Tensor:
        products = q @ _served(k, H, tiled).transpose(1, 2) * scale
        visible = _triangle(T, leak).triu(1 - window)
        return products.masked_fill(~visible.to(q.device), -math.inf)

    yield "", masked()
    yield TILED, masked(tiled=True)
    yield "mask leaks one token", masked(leak=1)
    yield "nothing is masked: a token sees the future", masked(leak=T)
    yield "a token cannot see itself", masked(leak=-1)
    if window < T:
        yield "the sliding window is left out", masked(window=T)
        yield "the sliding window is one token longer", masked(window=window + 1)
    scales = {
        "1/sqrt(hidden_size)": C**-0.5,
        "1/head_dim": 1 / D,
        "1 (none)": 1.0,
        "1/hidden_size": 1 / C,
        "sqrt(head_dim)": D**0.5,
    }
    for name, scale in scales.items():
        yield f"scores are scaled by {name}, not by 1/sqrt(head_dim)", masked(scale)


def scores(scene: Scene) -> Suspects:
    """Scores before the softmax, (H, T, S), masked ones -inf."""
    yield from _scored(scene)
    q, observed, right = scene["self_attn.q_rot"], scene.observed, scene.config["head_dim"] ** -0.5
    H, T, _ = q.shape
    if observed.shape != (H, T, T):
        return
    causal, visible = _triangle(T).to(q.device), observed[0] != -math.inf
    products = q @ _served(scene["self_attn.k_rot"], H).transpose(1, 2)
    known, seen = products[:, causal], observed[:, causal]
    fitted = float(f"{((known * seen).sum() / known.square().sum()).item():.4g}")
    scaled = (products * fitted).masked_fill(~causal, -math.inf)
    yield f"scores are scaled by {fitted:g}, not by 1/sqrt(head_dim) = {right:g}", scaled
    yield _mask_in_words(visible), (products * right).masked_fill(~visible, -math.inf)


def _mask_in_words(visible: Tensor) -> str:
    """How a mask (T, T) differs from the causal one."""
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
    v, H = scene.heads("self_attn.v_proj"), scene["self_attn.q_rot"].shape[0]
    for name, scores in _scored(scene):
        yield name, _softmax(scores) @ _served(v, H, tiled=name == TILED)
        if name == "":
            yield TILED.replace("KV", "V"), _softmax(scores) @ _served(v, H, tiled=True)
