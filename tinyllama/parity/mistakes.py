"""Well-known mistakes outside attention proper, each as a formula: embedding, norms, matrices, MLP, block."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.parity.scene import Scene, Suspects, rounded, short


def embedding(scene: Scene) -> Suspects:
    """The rows of the embedding, (T, C)."""
    ids = list(scene.ids)
    weight = scene.weight("embed_tokens")
    right = weight[ids]
    yield "", right
    yield "embeddings are scaled by sqrt(hidden_size)", right * math.sqrt(weight.shape[1])
    yield "ids are shifted: the first one is missing", weight[[*ids[1:], ids[-1]]]
    yield "ids are shifted: there is one too many in front", weight[[ids[0], *ids[:-1]]]
    for dtype in (torch.bfloat16, torch.float16):
        yield f"embeddings are rounded to {short(dtype)}", rounded(right, dtype)


def norm(scene: Scene) -> Suspects:
    """The output of an RMSNorm, (T, C); the second of a layer reads the residual stream after attention."""
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
        yield f"the norm is computed in {short(dtype)}", low.to(torch.float64)
    if second:
        without = "the residual stream is left out: attention's output alone is normalised"
        yield without, rms(scene["self_attn.o_proj"], eps) * w
        yield "attention's output is not added to the residual stream", rms(scene["input"], eps) * w


# What each matrix is multiplied with.
FACTORS = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "o_proj": "self_attn.z",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
    "down_proj": "mlp.product",
    "lm_head": "input",
}


def linear(scene: Scene) -> Suspects:
    """A product with a matrix, (T, out)."""
    x = scene[FACTORS[scene.name]]
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
        product_of_rounded = rounded(x, dtype) @ rounded(w, dtype).T
        yield f"inputs and weights are rounded to {short(dtype)}", product_of_rounded
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
    """Round to the 10 bits of mantissa that tensor cores keep of a float32."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(torch.float64)


def product(scene: Scene) -> Suspects:
    """The MLP's gated product, (T, F)."""
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


def block(scene: Scene) -> Suspects:
    """A layer's output, (T, C)."""
    x, attended, mlp = scene["input"], scene["self_attn.o_proj"], scene["mlp.down_proj"]
    yield "", x + attended + mlp
    yield "the layer is skipped", x
    yield "the MLP is skipped", x + attended
    yield "attention is skipped", x + mlp
    yield "the MLP's output alone is passed on, without the residual stream", mlp
    yield "the layer's input is left out of its output", attended + mlp
