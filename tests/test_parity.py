"""Our logits against transformers and the float64 oracle, and the proof that this comparison can fail.

The fixture has unit-gain random weights, under which every operation matters; criteria are those of
`tinyllama.parity.judge`, relative to transformers' own error.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import tinyllama.attention
import tinyllama.model
from tests.shapes import LLAMA3_SCALING, some_ids, tiny_model
from tinyllama.attention import KERNELS, Visibility, eager
from tinyllama.checkpoint import load_model
from tinyllama.model import Llama, RMSNorm
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.rope import RotaryEmbedding

T = 64
IDS = some_ids(1, T)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def measured(model, logits):
    """Verdict on `logits` of IDS, and their error in units of the reference's."""
    truth = oracle_logits(config_fields(model.config), model.state_dict(), IDS[0].tolist())
    references = [
        difference(reference_model(model, name)(IDS).logits[0], truth) for name in ("eager", "sdpa")
    ]
    ours = difference(logits[0], truth)
    verdict = judge(ours, references, model.embed_tokens.weight.dtype)
    return verdict, ours.relative / max(reference.relative for reference in references)


@pytest.mark.parametrize("attention", sorted(KERNELS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fixture_passes_in_every_dtype(dtype, attention):
    model = tiny_model(dtype=dtype, attention=attention)
    verdict, _ = measured(model, model(IDS))
    assert verdict.passed, verdict.failures


SHAPES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 8},
    "MQA": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "llama3 RoPE": {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0},
    "head_dim unlike hidden/heads": {"head_dim": 22},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "eps 1e-6": {"rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("attention", sorted(KERNELS))
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_equal_transformers_bit_for_bit(shape, attention):
    model = tiny_model(attention=attention, **SHAPES[shape])
    assert torch.equal(model(IDS), reference_model(model, attention)(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_equal_transformers_bit_for_bit(dtype):
    model = tiny_model(dtype=dtype)
    assert torch.equal(model(IDS), reference_model(model, "eager")(IDS).logits)


@pytest.mark.parametrize("shard_size", ["50GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_written_by_transformers_gives_its_logits(tmp_path, shard_size, tied):
    model = tiny_model(tie_word_embeddings=tied)
    reference = reference_model(model, "eager")
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "50GB")
    loaded = load_model(tmp_path, device="cpu", dtype="float32", attention="eager")
    assert torch.equal(loaded(IDS), reference(IDS).logits)


def test_gradients_of_every_weight_equal_transformers():
    model = tiny_model()
    reference = reference_model(tiny_model(), "eager")
    with torch.enable_grad():
        for network, logits in ((model, model(IDS)), (reference, reference(IDS).logits)):
            F.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
            assert all(parameter.grad is not None for parameter in network.parameters())
    expected = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, name


# Each mutation takes (model, monkeypatch) and returns the logits of a Llama with one thing wrong.


def with_config(**changes):
    def mutate(model, monkeypatch):
        mutant = Llama(dataclasses.replace(model.config, **changes))
        mutant.load_state_dict(model.state_dict())
        mutant.set_attention(eager)
        return mutant(IDS)

    return mutate


def with_eps_0(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 0.0
    return model(IDS)


def with_interleaved_pairs(model, monkeypatch):
    def rotate(x, cos, sin):
        x1, x2 = x[..., ::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)

    monkeypatch.setattr(tinyllama.attention, "rotate", rotate)
    return model(IDS)


def with_positions_plus_1(model, monkeypatch):
    return model(IDS, positions=torch.arange(1, T + 1)[None])


def with_bfloat16_angles(model, monkeypatch):
    def forward(rotary, positions, dtype):
        angles = positions[:, None, :, None].bfloat16() * rotary.frequencies[torch.float32].bfloat16()
        return angles.cos().to(dtype), angles.sin().to(dtype)

    monkeypatch.setattr(RotaryEmbedding, "forward", forward)
    return model(IDS)


def with_tiled_kv_heads(model, monkeypatch):
    def tiled(q, k, v, context):
        G = q.shape[1] // k.shape[1]
        return eager(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1), context)

    model.set_attention(tiled)
    return model(IDS)


def with_scale_by_hidden_size(model, monkeypatch):
    C = model.config.hidden_size
    model.set_attention(lambda q, k, v, c: eager(q, k, v, dataclasses.replace(c, scale=C**-0.5)))
    return model(IDS)


def with_leaking_mask(model, monkeypatch):
    original = Visibility.of

    def leaking(positions, cache, causal):
        visible = original(positions, cache, causal)
        return dataclasses.replace(
            visible, mask=visible.mask | visible.mask.roll(1, dims=-2) | visible.mask.roll(1, -1)
        )

    monkeypatch.setattr(Visibility, "of", staticmethod(leaking))
    return model(IDS)


def with_layer_norm(model, monkeypatch):
    def forward(norm, x):
        return F.layer_norm(x, x.shape[-1:], norm.weight, None, norm.eps)

    monkeypatch.setattr(RMSNorm, "forward", forward)
    return model(IDS)


def with_one_plus_weight(model, monkeypatch):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(1.0)
    return model(IDS)


def with_gelu(model, monkeypatch):
    monkeypatch.setattr(tinyllama.model.F, "silu", F.gelu)
    return model(IDS)


def with_gate_and_up_swapped(model, monkeypatch):
    for layer in model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    return model(IDS)


def with_last_layer_skipped(model, monkeypatch):
    del model.layers[-1]
    return model(IDS)


def with_final_norm_skipped(model, monkeypatch):
    model.norm = torch.nn.Identity()
    return model(IDS)


MUTATIONS = {
    "eps 1e-6": with_config(rms_norm_eps=1e-6),
    "eps 0": with_eps_0,
    "theta + 1%": with_config(rope_theta=10100.0),
    "theta 500k": with_config(rope_theta=500000.0),
    "interleaved RoPE pairing": with_interleaved_pairs,
    "bf16 RoPE angles": with_bfloat16_angles,
    "KV heads tiled instead of repeated": with_tiled_kv_heads,
    "scale by hidden size": with_scale_by_hidden_size,
    "LayerNorm for RMSNorm": with_layer_norm,
    "weight + 1 in the norm": with_one_plus_weight,
    "GELU for SiLU": with_gelu,
    "gate and up swapped": with_gate_and_up_swapped,
    "mask leaks one token": with_leaking_mask,
    "last layer skipped": with_last_layer_skipped,
    "final norm skipped": with_final_norm_skipped,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_gate_fails_on(mutation, monkeypatch):
    logits = MUTATIONS[mutation](tiny_model(), monkeypatch)
    monkeypatch.undo()
    verdict, score = measured(tiny_model(), logits)
    assert not verdict.passed
    assert score > 5000


def test_the_gate_passes_positions_plus_1_which_rope_cannot_see(monkeypatch):
    model = tiny_model()
    verdict, score = measured(model, with_positions_plus_1(model, monkeypatch))
    assert verdict.passed, verdict.failures
    assert 0.5 < score < 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_fails_on_nan(dtype):
    model = tiny_model(dtype=dtype)
    logits = model(IDS)
    logits[0, 3, 5] = float("nan")
    verdict, _ = measured(model, logits)
    assert not verdict.passed


def test_the_oracle_agrees_with_a_transformers_run_whose_norms_and_rope_are_float64(monkeypatch):
    # .double() alone leaves both in float32. Two independent implementations then meet at 1e-12.
    from transformers.models.llama import modeling_llama

    def norm(module, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    def rotary(module, x, position_ids):
        exponents = torch.arange(0, 8, 2, dtype=torch.float64) / 8
        angles = position_ids[..., None].double() / 10000.0**exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def softmax(scores, dim, dtype=None):
        return torch.softmax(scores, dim)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(modeling_llama.nn.functional, "softmax", softmax)
    model = tiny_model(dtype=torch.float64)
    truth = oracle_logits(config_fields(model.config), model.state_dict(), IDS[0].tolist())
    assert difference(reference_model(model, "eager")(IDS).logits[0], truth).relative <= 1e-12
