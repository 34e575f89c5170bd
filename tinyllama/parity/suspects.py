"""Which well-known mistake gives these values? Each suspect is a formula that is tried, not a guess.

Where a value diverges, the values that went into it are known. So every mistake is computed in float64 from
the same inputs, numbers (eps, RoPE's theta, the scale of the scores) are fitted, and a suspect is named only
where it explains the observed values at least ten times better than the right formula does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The error that a suspect leaves, as a share of the error that the right formula leaves.
EXPLAINED = 0.1
# A later suspect must be this much better than an earlier one: some are special cases of one another.
BETTER = 0.5

# The right formula first, under the name "", then one per mistake.
Suspects = Iterator[tuple[str, Tensor]]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """RMS error over the RMS of the truth; inf for another shape, another mask (-inf), or NaN."""
    if value.shape != truth.shape:
        return math.inf
    value, visible = value.to(torch.float64), truth != -math.inf
    if not torch.equal(value != -math.inf, visible):
        return math.inf
    if not bool(visible.all()):
        value, truth = value[visible], truth[visible]
    error, size = (value - truth).norm().item(), truth.norm().item()
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Scene:
    """All that is known where a value diverges.

    Attributes:
        address: of the value.
        seen: what the diverging implementation computed, by address and in float64: its values in the layer,
            and under "input" what went into the layer (or, outside the layers, into the operation). Scores
            that are masked are -inf.
        config: of the right model, as for `oracle_logits`.
        weights: of the right model, as for `oracle_logits`.
        ids: the text.
    """

    address: str
    seen: Mapping[str, Tensor]
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ids: Sequence[int]

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition(".")[2]

    @property
    def observed(self) -> Tensor:
        """The diverging value."""
        return self.seen[self.address]

    def path(self, name: str) -> str:
        """The address of another value of the layer."""
        return name if name == "input" else ".".join([*self.address.split(".")[:2], name])

    def __contains__(self, name: str) -> bool:
        """Whether that value of the layer was seen."""
        return self.path(name) in self.seen

    def __getitem__(self, name: str) -> Tensor:
        """That value of the layer."""
        return self.seen[self.path(name)]

    def weight(self, address: str) -> Tensor:
        """A weight in float64."""
        return self.weights[address + ".weight"].to(torch.float64)

    def heads(self, name: str) -> Tensor:
        """A projection, split into heads: (heads, T, D)."""
        return self[name].unflatten(-1, (-1, self.config["head_dim"])).transpose(0, 1)


def suspect(scene: Scene) -> str | None:
    """Name the mistake that explains the value, or None where no known one does, or its inputs are unseen."""
    block = scene.address.startswith("layers.") and scene.address.count(".") == 1
    mistakes = _block if block else _MISTAKES[scene.name]
    found, least = None, math.inf
    try:
        for name, value in mistakes(scene):
            error = relative_error(scene.observed, value)
            if name == "":
                least = EXPLAINED * error
                if value.shape != scene.observed.shape:
                    break
            elif error < least:
                found, least = name, BETTER * error
    except KeyError:
        pass
    return found


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(torch.float64)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _embedding(scene: Scene) -> Suspects:
    ids = list(scene.ids)
    weight = scene.weight("embed_tokens")
    right = weight[ids]
    yield "", right
    yield "embeddings are scaled by sqrt(hidden_size)", right * math.sqrt(weight.shape[1])
    yield "ids are shifted: the first one is missing", weight[[*ids[1:], ids[-1]]]
    yield "ids are shifted: there is one too many in front", weight[[ids[0], *ids[:-1]]]
    for dtype in (torch.bfloat16, torch.float16):
        yield f"embeddings are rounded to {_short(dtype)}", _rounded(right, dtype)


def _norm(scene: Scene) -> Suspects:
    eps, w = scene.config["rms_norm_eps"], scene.weight(scene.address)
    second = scene.name == "post_attention_layernorm"
    x = scene["input"] + scene["self_attn.o_proj"] if second else scene["input"]

    def rms(x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()

    yield "", rms(x, eps) * w
    yield "the norm is skipped", x
    yield "norm weight is applied as 1 + w", rms(x, eps) * (1 + w)
    yield "norm weight is not applied", rms(x, eps)
    mean_subtracted = F.layer_norm(x, x.shape[-1:], eps=eps) * w
    yield "LayerNorm is used for RMSNorm: the mean is subtracted", mean_subtracted
    mean_square = x.square().mean(dim=-1, keepdim=True)
    # Each row is x * w / sqrt(mean_square + eps): solve for eps.
    factor = (scene.observed * x * w).sum(dim=-1, keepdim=True) / (x * w).square().sum(dim=-1, keepdim=True)
    fitted = float(f"{(factor**-2 - mean_square).median().item():.3g}")
    fitted = 0.0 if abs(fitted) < 1e-3 * eps else fitted
    if fitted >= 0:
        yield f"eps is {fitted:g}, not {eps:g}", rms(x, fitted) * w
    yield "eps is added to the root instead of under it", x / (mean_square.sqrt() + eps) * w
    for name in scene.weights:
        other = name.removesuffix(".weight")
        if other.endswith("norm") and other != scene.address:
            yield f"the weight of {other} is used", rms(x, eps) * scene.weight(other)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        low = low * torch.rsqrt(low.square().mean(dim=-1, keepdim=True) + eps) * w.to(dtype)
        yield f"the norm is computed in {_short(dtype)}", low.to(torch.float64)
    if second:
        without = "the residual stream is left out: attention's output alone is normalised"
        yield without, rms(scene["self_attn.o_proj"], eps) * w
        yield "attention's output is not added to the residual stream", rms(scene["input"], eps) * w


# What each matrix is multiplied with.
_FACTORS = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "o_proj": "self_attn.z",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
    "down_proj": "mlp.product",
    "lm_head": "input",
}


def _linear(scene: Scene) -> Suspects:
    x = scene[_FACTORS[scene.name]]
    if scene.name == "o_proj":
        heads, x = x, x.transpose(0, 1).flatten(1)  # (H, T, D) -> (T, H*D)
    tied = scene.name == "lm_head" and scene.config.get("tie_word_embeddings", False)
    w = scene.weight("embed_tokens" if tied else scene.address)
    yield "", x @ w.T
    if scene.name == "o_proj":
        yield "heads are merged without being transposed back", heads.reshape(x.shape) @ w.T
    if scene.name in ("q_proj", "k_proj"):
        pairs = scene.config["head_dim"] // 2
        as_meta = w.unflatten(0, (-1, 2, pairs)).transpose(1, 2).flatten(0, 2)
        yield "its rows are in the pair order of Meta's and llama.cpp's files", x @ as_meta.T
        twice = w.unflatten(0, (-1, pairs, 2)).transpose(1, 2).flatten(0, 2)
        yield "its rows were put into Hugging Face's pair order twice", x @ twice.T
    if w.shape[0] == w.shape[1]:
        yield "the weight is transposed", x @ w
    for name, weight in scene.weights.items():
        other = name.removesuffix(".weight")
        if weight.shape == w.shape and other != scene.address and not (tied and other == "lm_head"):
            yield _mix_up(scene.address, other), x @ scene.weight(other).T
    yield "a bias is added", x @ w.T + (scene.observed - x @ w.T).mean(dim=0)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = _rounded(x, dtype) @ _rounded(w, dtype).T
        yield f"inputs and weights are rounded to {_short(dtype)}", rounded
    yield "the product is computed in TF32", _tf32(x) @ _tf32(w).T
    if scene.name in ("q_proj", "k_proj", "v_proj") and "input" in scene:
        yield "the input is not normalised", scene["input"] @ w.T


def _mix_up(address: str, other: str) -> str:
    swapped = {("gate_proj", "up_proj"): "gate and up", ("k_proj", "v_proj"): "k and v"}
    at, _, name = address.rpartition(".")
    other_at, _, other_name = other.rpartition(".")
    pair = (min(name, other_name), max(name, other_name))
    if at == other_at and pair in swapped:
        return f"{swapped[pair]} are swapped"
    return f"the weight of {other} is used"


def _tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that tensor cores keep of a float32."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(torch.float64)


def _rope(scene: Scene) -> Suspects:
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
        yield f"angles are computed in {_short(dtype)}", turn(low.to(torch.float64))
        cos, sin = (f.to(torch.float64).repeat(1, 2) for f in (low.cos(), low.sin()))
        low_turn = x * cos + torch.cat((-second, first), dim=-1) * sin
        yield f"angles are computed in {_short(dtype)}", low_turn


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


def _scores(scene: Scene) -> Suspects:
    q, k, observed = scene["self_attn.q_rot"], scene["self_attn.k_rot"], scene.observed
    H, T, right = q.shape[0], q.shape[1], scene.config["head_dim"] ** -0.5
    causal = _triangle(T).to(q.device)

    def scores(scale: float = right, tiled: bool = False, visible: Tensor = causal) -> Tensor:
        products = q @ _served(k, H, tiled).transpose(1, 2) * scale
        return products.masked_fill(~visible.to(q.device), -math.inf)

    yield "", scores()
    yield TILED, scores(tiled=True)
    for name, visible in _masks(T).items():
        yield name, scores(visible=visible)
    for name, scale in _scales(scene.config).items():
        yield f"scores are scaled by {name}, not by 1/sqrt(head_dim)", scores(scale)
    if observed.shape != (H, T, T):
        return
    products, seen = scores(1.0)[:, causal], observed[:, causal]
    fitted = float(f"{((products * seen).sum() / products.square().sum()).item():.4g}")
    yield f"scores are scaled by {fitted:g}, not by 1/sqrt(head_dim) = {right:g}", scores(fitted)
    visible = observed[0] != -math.inf
    yield _mask_in_words(visible), scores(visible=visible)


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


def _pattern(scene: Scene) -> Suspects:
    scores = scene["self_attn.scores"]
    yield "", _softmax(scores)
    yield "softmax runs over the queries", scores.softmax(dim=-2).nan_to_num()
    yield "softmax is left out", scores.masked_fill(scores == -math.inf, 0)
    yield "softmax has 1 added to its denominator", _softmax(F.pad(scores, (0, 1)))[..., :-1]
    for dtype in (torch.bfloat16, torch.float16):
        yield f"the pattern is rounded to {_short(dtype)}", _rounded(_softmax(scores), dtype)
        yield f"softmax is computed in {_short(dtype)}", _rounded(_softmax(_rounded(scores, dtype)), dtype)


def _attended(scene: Scene) -> Suspects:
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


def _product(scene: Scene) -> Suspects:
    gate, up = scene["mlp.gate_proj"], scene["mlp.up_proj"]
    yield "", F.silu(gate) * up
    yield "gate and up are swapped", F.silu(up) * gate
    yield "GELU is used for SiLU", F.gelu(gate) * up
    yield "GELU (by tanh) is used for SiLU", F.gelu(gate, approximate="tanh") * up
    yield "ReLU is used for SiLU", F.relu(gate) * up
    yield "a sigmoid is used for SiLU (GLU)", gate.sigmoid() * up
    yield "the gate has no activation", gate * up
    yield "the gate is left out", up
    yield "up is left out", F.silu(gate)


def _block(scene: Scene) -> Suspects:
    x, attended, mlp = scene["input"], scene["self_attn.o_proj"], scene["mlp.down_proj"]
    yield "", x + attended + mlp
    yield "the layer is skipped", x
    yield "the MLP is skipped", x + attended
    yield "attention is skipped", x + mlp
    yield "the MLP's output is not added to the residual stream", mlp
    yield "the residual stream is left out of the output", attended + mlp


_MISTAKES: dict[str, Callable[[Scene], Suspects]] = {
    "embed_tokens": _embedding,
    "input_layernorm": _norm,
    "post_attention_layernorm": _norm,
    "norm": _norm,
    **dict.fromkeys(_FACTORS, _linear),
    "q_rot": _rope,
    "k_rot": _rope,
    "scores": _scores,
    "pattern": _pattern,
    "z": _attended,
    "product": _product,
}
