"""The proof that parity can fail: sixteen planted bugs, with the operation and suspect that must be named.

On the unit-gain fixture fifteen of them score thousands of times the reference's error. The sixteenth,
positions that start at 1, is harmless, because RoPE makes attention depend on distances only: it must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyllama.attention
import tinyllama.model
from tinyllama.attention import AttentionContext, AttentionMask, Kernel, eager
from tinyllama.model import MLP, Llama, RMSNorm
from tinyllama.parity.changed import changed
from tinyllama.parity.divergence import bisect
from tinyllama.parity.fixture import LENGTH, fixture, random_ids
from tinyllama.parity.measure import difference, judge
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.trace import our_trace, reference_trace
from tinyllama.rope import RotaryEmbedding

Planted = AbstractContextManager[Any]


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        name: as in the specification of the gate.
        planted: makes any Llama wrong while its context is open, and right again afterwards. Some change what
            all models share, so no reference of ours may run inside the context.
        address: the first operation that diverges; None for the harmless one.
        suspect: the mistake to be named there.
    """

    name: str
    planted: Callable[[Llama], Planted]
    address: str | None = None
    suspect: str | None = None


@dataclass(frozen=True)
class Trial:
    """What the judge made of a mutation.

    Attributes:
        name: the mutation's.
        harmless: whether it must pass.
        score: relRMS of the logits, in units of transformers' own (R).
        passed: whether the criteria let it pass.
        address: the first divergence; None where none was found.
        suspect: the mistake that was named there.
        right: whether it failed at the expected operation with the expected suspect, or is harmless and
            passed.
    """

    name: str
    harmless: bool
    score: float
    passed: bool
    address: str | None
    suspect: str | None
    right: bool


@torch.no_grad()
def try_mutations(mutations: Sequence[Mutation]) -> Iterator[Trial]:
    """Plant each mutation in a fresh fixture, and judge it."""
    right = fixture()
    ids = random_ids(LENGTH, right.config.vocab_size)
    truth = oracle_logits(config_fields(right.config), right.state_dict(), ids)
    models = [reference_model(right, name) for name in ("eager", "sdpa")]
    references = [difference(model(torch.tensor([ids])).logits[0], truth) for model in models]
    runs = [lambda ids, at, model=model: reference_trace(model, ids, at) for model in models]
    for mutation in mutations:
        wrong = fixture()
        wrong.set_attention(eager)
        with mutation.planted(wrong):
            measured = difference(wrong(torch.tensor([ids]))[0], truth)
            found = bisect(lambda ids, at: our_trace(wrong, ids, at), right, ids, runs)  # noqa: B023
        harmless = mutation.address is None
        passed = judge(measured, references, torch.float32).passed
        address, suspect = (found.address, found.suspect) if found else (None, None)
        yield Trial(
            name=mutation.name,
            harmless=harmless,
            score=measured.relative / max(reference.relative for reference in references),
            passed=passed,
            address=address,
            suspect=suspect,
            right=passed == harmless and (address, suspect) == (mutation.address, mutation.suspect),
        )


def _patch(thing: Any, name: str, value: Any) -> Callable[[Llama], Planted]:
    """Plant something that all models share."""
    return lambda model: changed((thing, name, value))


def _in_norms(name: str, wrong: Callable[[RMSNorm], Any]) -> Callable[[Llama], Planted]:
    """Plant an attribute of every norm."""

    def planted(model: Llama) -> Planted:
        norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
        return changed(*((norm, name, wrong(norm)) for norm in norms))

    return planted


def _kernel(kernel: Kernel) -> Callable[[Llama], Planted]:
    return lambda model: changed(*((block.self_attn, "kernel", kernel) for block in model.layers))


def _theta(theta: float) -> Callable[[Llama], Planted]:
    def planted(model: Llama) -> Planted:
        return changed((model, "rotary", RotaryEmbedding(replace(model.config, rope_theta=theta))))

    return planted


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x[..., ::2], x[..., 1::2]
    cos, sin = cos.chunk(2, dim=-1)[1], sin.chunk(2, dim=-1)[1]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)


def _positions_plus_1(model: Llama) -> Planted:
    def shift(_model: nn.Module, args: tuple[Tensor], keywords: dict[str, Any]) -> Any:
        ids = args[0]
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
        return args, keywords | {"positions": positions}

    return model.register_forward_pre_hook(shift, with_kwargs=True)


def _bfloat16_angles(rotary: RotaryEmbedding, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = rotary.frequencies(torch.float32, positions.device).bfloat16()
    angles = positions[:, None, :, None].bfloat16() * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _tiled(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    G = q.shape[1] // k.shape[1]
    return eager(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1), context)


def _scaled_by_hidden_size(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    _, H, _, D = q.shape
    return eager(q, k, v, replace(context, scale=(H * D) ** -0.5))


def _leaking_mask(
    *args: Any, of: Callable[..., AttentionMask] = AttentionMask.of, **keywords: Any
) -> AttentionMask:
    mask = of(*args, **keywords)
    ahead = mask.key_positions[:, None, None, :] <= mask.query_positions[:, None, :, None] + 1
    return replace(mask, allowed=ahead, causal=False)


def _layer_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, None, norm.eps)


def _gate_and_up_swapped(model: Llama) -> Planted:
    mlps = [module for module in model.modules() if isinstance(module, MLP)]
    gates = [(mlp, "gate_proj", mlp.up_proj) for mlp in mlps]
    return changed(*gates, *((mlp, "up_proj", mlp.gate_proj) for mlp in mlps))


NORM, Q_ROT, SCORES = "layers.0.input_layernorm", "layers.0.self_attn.q_rot", "layers.0.self_attn.scores"
MUTATIONS = [
    Mutation("eps 1e-6", _in_norms("eps", lambda norm: 1e-6), NORM, "eps is 1e-06, not 1e-05"),
    Mutation("eps 0", _in_norms("eps", lambda norm: 0.0), NORM, "eps is 0, not 1e-05"),
    Mutation("theta + 1%", _theta(10100.0), Q_ROT, "theta is 10100, not 10000"),
    Mutation("theta 500k", _theta(500000.0), Q_ROT, "theta is 500000, not 10000"),
    Mutation(
        "interleaved RoPE pairing",
        _patch(tinyllama.attention, "rotate", _interleaved),
        Q_ROT,
        "RoPE pairing is interleaved: 2i with 2i + 1, as in Meta's files",
    ),
    Mutation("positions + 1", _positions_plus_1),
    Mutation(
        "bf16 RoPE angles",
        _patch(RotaryEmbedding, "forward", _bfloat16_angles),
        Q_ROT,
        "angles are computed in bfloat16",
    ),
    Mutation(
        "KV heads tiled instead of repeated",
        _kernel(_tiled),
        SCORES,
        "KV heads are tiled (query head h reads KV head h mod K), not repeated",
    ),
    Mutation(
        "scale by hidden size",
        _kernel(_scaled_by_hidden_size),
        SCORES,
        "scores are scaled by 1/sqrt(hidden_size), not by 1/sqrt(head_dim)",
    ),
    Mutation(
        "LayerNorm for RMSNorm",
        _patch(RMSNorm, "forward", _layer_norm),
        NORM,
        "LayerNorm is used for RMSNorm: the mean is subtracted",
    ),
    Mutation(
        "weight + 1 in the norm",
        _in_norms("weight", lambda norm: nn.Parameter(norm.weight.detach() + 1)),
        NORM,
        "norm weight is applied as 1 + w",
    ),
    # In the model's own namespace, because torch's F.silu is transformers' too.
    Mutation(
        "GELU for SiLU",
        _patch(tinyllama.model, "F", SimpleNamespace(silu=F.gelu)),
        "layers.0.mlp.product",
        "GELU is used for SiLU",
    ),
    Mutation(
        "gate and up swapped", _gate_and_up_swapped, "layers.0.mlp.gate_proj", "gate and up are swapped"
    ),
    Mutation(
        "mask leaks one token",
        _patch(AttentionMask, "of", staticmethod(_leaking_mask)),
        SCORES,
        "mask leaks one token",
    ),
    Mutation(
        "last layer skipped",
        lambda model: changed((model, "layers", model.layers[:-1])),
        "layers.3",
        "layers.3 is skipped",
    ),
    Mutation(
        "final norm skipped",
        lambda model: changed((model, "norm", nn.Identity())),
        "norm",
        "the norm is skipped",
    ),
]
