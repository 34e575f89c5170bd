"""The ten functions, made of the project's own parts: what a learner's function calls while it is judged.

Arguments and results are those of the skeleton, in any floating dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from tinyllama.attention import AttentionContext, AttentionMask, eager
from tinyllama.config import LlamaConfig
from tinyllama.model import MLP, Block, Llama, RMSNorm
from tinyllama.rope import RotaryEmbedding, inverse_frequencies, rotate
from tinyllama.sampler import Sampler

Weights = Mapping[str, Tensor]
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """(T,), (V, C) -> (T, C)."""
    return F.embedding(ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(T, C), (C,) -> (T, C)."""
    return functional_call(RMSNorm(len(weight), eps), {"weight": weight}, (x,))


def frequencies(head_dim: int, theta: float) -> Tensor:
    """-> (D/2,)."""
    return inverse_frequencies(replace(LlamaConfig(), head_dim=head_dim, rope_theta=theta))


def rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """(heads, T, D), (T,), (D/2,) -> (heads, T, D)."""
    return rotate(x[None], *_rotation(positions, frequencies, x.dtype))[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, T, D), (K, S, D), (K, S, D) -> (H, T, D)."""
    S, T = k.shape[1], q.shape[1]
    H, mask = q.shape[0], _mask(torch.arange(S - T, S), S)
    context = AttentionContext(mask, q.shape[-1] ** -0.5, 0, _same, _same, range(H), H)
    return eager(q[None], k[None], v[None], context)[0]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(T, C), (F, C), (F, C), (C, F) -> (T, C)."""
    with torch.device("meta"):
        mlp = MLP(replace(LlamaConfig(), hidden_size=gate.shape[1], intermediate_size=gate.shape[0]))
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    return functional_call(mlp, weights, (x,))


def block(x: Tensor, weights: Weights, config: LlamaConfig, positions: Tensor, remember: Remember) -> Tensor:
    """(T, C) -> (T, C)."""
    with torch.device("meta"):
        layer = Block(config, 0)
    # Whatever `remember` gives is read: a learner's may forget, or give too much.
    layer.self_attn.kernel = lambda q, k, v, context: attention(q[0], k[0], v[0])[None]
    rotation = _rotation(positions, frequencies(config.head_dim, config.rope_theta), x.dtype)
    given = (x[None], rotation, _mask(positions, len(positions)), _Remembering(remember))
    return functional_call(layer, dict(weights), given)[0]


def llama(ids: Tensor, weights: Weights, config: LlamaConfig) -> Tensor:
    """(T,) -> (T, V)."""
    return _model(weights, config)(ids[None])[0]


def decode(ids: Tensor, weights: Weights, config: LlamaConfig, cache: dict[Any, Any]) -> Tensor:
    """(T,) -> (T, V); the dict holds a model and an ordinary KVCache."""
    if not cache:
        cache["model"] = model = _model(weights, config)
        cache["cache"] = model.new_cache(1, config.context)
    return cache["model"](ids[None], cache["cache"])[0]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """(V,) -> an id."""
    return int(Sampler(temperature, top_k, top_p).choose(logits[None], generator))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (embedding, rms_norm, frequencies, rope, attention, swiglu, block, llama, decode, sample)
}


def _model(weights: Weights, config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(dict(weights), assign=True)
    return model


@dataclass
class _Remembering:
    """A cache, as far as Attention uses it, that hands keys and values to a function."""

    remember: Remember

    def write(self, layer: int, mask: AttentionMask, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(1, K, T, D) -> (1, K, S, D)."""
        keys, values = self.remember(k[0], v[0])
        return keys[None], values[None]


def _same(x: Tensor) -> Tensor:
    return x


def _mask(positions: Tensor, S: int) -> AttentionMask:
    rotary = RotaryEmbedding(LlamaConfig())  # which no kernel here asks
    return AttentionMask.of(positions[None], torch.arange(S)[None], True, rotary)


def _rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` needs, each (1, 1, T, D)."""
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(dtype)[None, None], angles.sin().to(dtype)[None, None]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
