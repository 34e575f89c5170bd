"""The proof that the gate can fail: sixteen planted bugs, each with the operation and suspect it must give.

On the unit-gain fixture fifteen of them score thousands of times the reference's error. The sixteenth,
positions that start at 1, is harmless: RoPE makes attention depend on distances only. It must pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyllama.attention
import tinyllama.model
from tinyllama.attention import AttentionContext, AttentionMask, eager
from tinyllama.model import MLP, Llama, RMSNorm
from tinyllama.parity.divergence import Divergence, bisect
from tinyllama.parity.fixture import LENGTH, fixture, random_ids
from tinyllama.parity.measure import Difference, difference, judge
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.trace import our_trace, reference_trace
from tinyllama.rope import RotaryEmbedding


@dataclass(frozen=True)
class Mutation:
    """One planted bug.

    Attributes:
        name: as in the specification of the gate.
        planted: makes a right model wrong, in place, while its context is open.
        address: the first operation that diverges; None for the harmless one.
        suspect: the mistake to be named there.
    """

    name: str
    planted: Callable[[Llama], AbstractContextManager[Any]]
    address: str | None
    suspect: str | None


@dataclass(frozen=True)
class Trial:
    """What the gate and the search made of a mutation.

    Attributes:
        mutation: the mutation.
        score: relRMS of the logits, in units of transformers' own (R).
        passed: whether the gate let it pass.
        found: the first divergence.
    """

    mutation: Mutation
    score: float
    passed: bool
    found: Divergence | None

    @property
    def right(self) -> bool:
        """Failed, at the right operation, for the right reason; or harmless, and passed."""
        mutation = self.mutation
        if mutation.address is None:
            return self.passed and self.found is None
        found = self.found
        at, why = (None, None) if found is None else (found.address, found.suspect)
        return not self.passed and at == mutation.address and why == mutation.suspect


@torch.no_grad()
def try_mutations() -> Iterator[Trial]:
    """Plant each mutation in a fresh fixture, and judge it."""
    right = fixture()
    ids = random_ids(LENGTH, right.config.vocab_size)
    truth = oracle_logits(config_fields(right.config), right.state_dict(), ids)
    models = [reference_model(right, name) for name in ("eager", "sdpa")]
    references = [difference(model(torch.tensor([ids])).logits[0], truth) for model in models]
    runs = [lambda ids, at, model=model: reference_trace(model, ids, at) for model in models]
    for mutation in MUTATIONS:
        wrong = fixture()
        wrong.set_attention(eager)
        with mutation.planted(wrong):
            measured = difference(wrong(torch.tensor([ids]))[0], truth)
            found = bisect(lambda ids, at: our_trace(wrong, ids, at), right, ids, runs)  # noqa: B023
        verdict = judge(measured, references, torch.float32)
        yield Trial(mutation, score(measured, references), verdict.passed, found)


def score(measured: Difference, references: list[Difference]) -> float:
    """A relRMS in units of the worse reference's."""
    return measured.relative / max(reference.relative for reference in references)


@contextmanager
def _eps(model: Llama, eps: float) -> Iterator[None]:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = eps
    yield


@contextmanager
def _theta(model: Llama, theta: float) -> Iterator[None]:
    model.rotary = RotaryEmbedding(dataclasses.replace(model.config, rope_theta=theta))
    yield


def _interleaved_pairs(model: Llama) -> AbstractContextManager[Any]:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x1, x2 = x[..., ::2], x[..., 1::2]
        cos, sin = cos.chunk(2, dim=-1)[1], sin.chunk(2, dim=-1)[1]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)

    return patch.object(tinyllama.attention, "rotate", rotate)


@contextmanager
def _positions_plus_1(model: Llama) -> Iterator[None]:
    def shift(_model: nn.Module, args: tuple[Tensor], keywords: dict[str, Any]) -> Any:
        ids = args[0]
        return args, keywords | {"positions": torch.arange(1, ids.shape[1] + 1).expand_as(ids)}

    with model.register_forward_pre_hook(shift, with_kwargs=True):
        yield


def _bfloat16_angles(model: Llama) -> AbstractContextManager[Any]:
    def forward(rotary: RotaryEmbedding, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].bfloat16() * rotary.frequencies[torch.float32].bfloat16()
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    return patch.object(RotaryEmbedding, "forward", forward)


@contextmanager
def _tiled_kv_heads(model: Llama) -> Iterator[None]:
    def tiled(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        G = q.shape[1] // k.shape[1]
        return eager(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1), context)

    model.set_attention(tiled)
    yield


@contextmanager
def _scale_by_hidden_size(model: Llama) -> Iterator[None]:
    C = model.config.hidden_size

    def scaled(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        return eager(q, k, v, dataclasses.replace(context, scale=C**-0.5))

    model.set_attention(scaled)
    yield


def _leaking_mask(model: Llama) -> AbstractContextManager[Any]:
    def leaking(positions: Tensor, keys: Tensor, causal: bool, rotary: RotaryEmbedding) -> AttentionMask:
        mask = original(positions, keys, causal, rotary)
        ahead = mask.key_positions[:, None, None, :] <= mask.query_positions[:, None, :, None] + 1
        return dataclasses.replace(mask, allowed=ahead, causal=False)

    original = AttentionMask.of
    return patch.object(AttentionMask, "of", staticmethod(leaking))


def _layer_norm(model: Llama) -> AbstractContextManager[Any]:
    def forward(norm: RMSNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight, None, norm.eps)

    return patch.object(RMSNorm, "forward", forward)


@contextmanager
def _one_plus_weight(model: Llama) -> Iterator[None]:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(1.0)
    yield


def _gelu(model: Llama) -> AbstractContextManager[Any]:
    # In the model's own namespace: torch's F.silu is transformers' too.
    return patch.object(tinyllama.model, "F", SimpleNamespace(silu=F.gelu))


@contextmanager
def _gate_and_up_swapped(model: Llama) -> Iterator[None]:
    for mlp in (module for module in model.modules() if isinstance(module, MLP)):
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    yield


@contextmanager
def _last_layer_skipped(model: Llama) -> Iterator[None]:
    del model.layers[-1]
    yield


@contextmanager
def _final_norm_skipped(model: Llama) -> Iterator[None]:
    model.norm = nn.Identity()  # type: ignore[assignment]
    yield


MUTATIONS = [
    Mutation("eps 1e-6", lambda m: _eps(m, 1e-6), "layers.0.input_layernorm", "eps is 1e-06, not 1e-05"),
    Mutation("eps 0", lambda m: _eps(m, 0.0), "layers.0.input_layernorm", "eps is 0, not 1e-05"),
    Mutation(
        "theta + 1%", lambda m: _theta(m, 10100.0), "layers.0.self_attn.q_rot", "theta is 10100, not 10000"
    ),
    Mutation(
        "theta 500k", lambda m: _theta(m, 500000.0), "layers.0.self_attn.q_rot", "theta is 500000, not 10000"
    ),
    Mutation(
        "interleaved RoPE pairing",
        _interleaved_pairs,
        "layers.0.self_attn.q_rot",
        "RoPE pairing is interleaved: 2i with 2i + 1, as in Meta's files",
    ),
    Mutation("positions + 1", _positions_plus_1, None, None),
    Mutation(
        "bf16 RoPE angles",
        _bfloat16_angles,
        "layers.0.self_attn.q_rot",
        "angles are computed in bfloat16",
    ),
    Mutation(
        "KV heads tiled instead of repeated",
        _tiled_kv_heads,
        "layers.0.self_attn.scores",
        "KV heads are tiled (query head h reads KV head h mod K), not repeated",
    ),
    Mutation(
        "scale by hidden size",
        _scale_by_hidden_size,
        "layers.0.self_attn.scores",
        "scores are scaled by 1/sqrt(hidden_size), not by 1/sqrt(head_dim)",
    ),
    Mutation(
        "LayerNorm for RMSNorm",
        _layer_norm,
        "layers.0.input_layernorm",
        "LayerNorm is used for RMSNorm: the mean is subtracted",
    ),
    Mutation(
        "weight + 1 in the norm",
        _one_plus_weight,
        "layers.0.input_layernorm",
        "norm weight is applied as 1 + w",
    ),
    Mutation("GELU for SiLU", _gelu, "layers.0.mlp.product", "GELU is used for SiLU"),
    Mutation(
        "gate and up swapped", _gate_and_up_swapped, "layers.0.mlp.gate_proj", "gate and up are swapped"
    ),
    Mutation("mask leaks one token", _leaking_mask, "layers.0.self_attn.scores", "mask leaks one token"),
    Mutation("last layer skipped", _last_layer_skipped, "layers.3", "layers.3 is skipped"),
    Mutation("final norm skipped", _final_norm_skipped, "norm", "the norm is skipped"),
]
