"""Invariants of the forward pass: each holds for any weights, and each breaks under a common bug.

"Within 2 eps" means: the difference is at most twice the model's own float32 error against the oracle.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shapes import some_ids, tiny_config, tiny_model
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama, RMSNorm
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import config_fields

pytestmark = pytest.mark.usefixtures("no_grad")

T = 48
kernels = pytest.mark.parametrize("attention", sorted(KERNELS))


def rms(x):
    return x.double().square().mean().sqrt().item()


def float32_error(model, ids, logits):
    truth = oracle_logits(config_fields(model.config), model.state_dict(), ids.tolist())
    return rms(logits.double() - truth)


def assert_within_2_eps(model, ids, logits, expected):
    """`logits` of one text differ from `expected` by at most twice the latter's error."""
    assert rms(logits - expected) <= 2 * float32_error(model, ids, expected)


@kernels
@pytest.mark.parametrize("sizes", [[1] * T, [5, 1, 17, 25], [T - 1, 1], [16, 16, 16]])
def test_cached_in_chunks_equals_uncached(attention, sizes):
    model, ids = tiny_model(attention=attention), some_ids(1, T)
    cache, placed, start = model.new_cache(1, T), model.new_cache(1, T), 0
    pieces, by_position = [], []
    for piece in ids.split(sizes, dim=1):
        end = start + piece.shape[1]
        pieces.append(model(piece, cache))
        by_position.append(model(piece, placed.first(end), torch.arange(start, end)[None]))
        start = end
    for logits in (pieces, by_position):
        assert_within_2_eps(model, ids[0], torch.cat(logits, dim=1)[0], model(ids)[0])


def test_a_cache_continues_or_is_refused_but_never_overwritten_in_silence():
    model, ids = tiny_model(), some_ids(1, T)
    cache = model.new_cache(1, T)
    model(ids[:, :20], cache)
    assert cache.length == 20
    with pytest.raises(InputError, match=f"cache: 20 of {T} slots are taken, so {T} new tokens do not fit"):
        model(ids, cache)
    assert cache.length == 20
    limit = 2 * float32_error(model, ids[0], model(ids)[0])
    assert rms(model(ids[:, 20:], cache) - model(ids)[:, 20:]) <= limit
    for placed in (model.new_cache(1, T), model.new_cache(1, T).first(T)):
        model(ids[:, :20], placed, torch.arange(20)[None])  # how long the row is, only the caller knows
        with pytest.raises(InputError, match="cache"):
            model(ids[:, 20:], placed)
        placed.length = 20
        assert rms(model(ids[:, 20:], placed) - model(ids)[:, 20:]) <= limit


@kernels
def test_a_cache_read_to_its_full_capacity_equals_one_read_to_its_length(attention):
    # A compiled decode step always reads the whole buffer; the mask alone hides what is not written yet.
    model, ids = tiny_model(attention=attention), some_ids(1, T)
    cache = model.new_cache(1, 3 * T)
    logits = model(ids, cache, torch.arange(T)[None])
    assert_within_2_eps(model, ids[0], logits[0], model(ids)[0])


@kernels
def test_a_row_alone_equals_the_row_in_a_batch(attention):
    model, ids = tiny_model(attention=attention), some_ids(3, T)
    together = model(ids)
    for row in range(3):
        assert_within_2_eps(model, ids[row], together[row], model(ids[row : row + 1])[0])


@kernels
@pytest.mark.parametrize("cached", [False, True])
@settings(max_examples=8)
@given(padding=st.integers(0, 64), pad_id=st.integers(0, 319))
def test_left_padding_changes_nothing_whatever_the_pad_id(attention, cached, padding, pad_id):
    with torch.no_grad():
        model, ids = tiny_model(attention=attention), some_ids(1, T)
        padded = torch.cat((torch.full((1, padding), pad_id), ids), dim=1)
        positions = (torch.arange(padding + T) - padding).clamp(min=-1)[None]
        cache = model.new_cache(1, T) if cached else None
        logits = model(padded, cache, positions)
        assert logits.isfinite().all()
        assert_within_2_eps(model, ids[0], logits[0, padding:], model(ids)[0])


@kernels
@pytest.mark.parametrize("t", [1, 7, T - 1])
def test_later_tokens_leave_earlier_logits_bit_identical(attention, t):
    model, ids = tiny_model(attention=attention), some_ids(1, T)
    changed = ids.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 320
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


@kernels
def test_what_lies_in_unused_slots_never_leaks(attention):
    model, ids = tiny_model(attention=attention), some_ids(1, T)
    clean, dirty = model.new_cache(1, 2 * T), model.new_cache(1, 2 * T)
    dirty.keys.fill_(float("nan"))
    dirty.values.fill_(float("nan"))
    assert torch.equal(model(ids, clean), model(ids, dirty))
    step, position = some_ids(1, 1, seed=1), torch.tensor([[T]])
    assert torch.equal(model(step, clean), model(step, dirty))
    assert torch.equal(model(step, clean.first(T + 1), position), model(step, dirty.first(T + 1), position))


@kernels
def test_a_cache_used_before_equals_a_fresh_one(attention):
    model, ids = tiny_model(attention=attention), some_ids(1, T)
    used = model.new_cache(1, T)
    model(some_ids(1, T, seed=5), used)
    used.length = 0
    assert torch.equal(model(ids, used), model(ids, model.new_cache(1, T)))
    # Going back: another second half, and then the first one's own again.
    half, expected = torch.arange(T // 2, T)[None], model(ids)
    model(some_ids(1, T // 2, seed=6), used, half)
    again = model(ids[:, T // 2 :], used, half)
    assert rms(again - expected[:, T // 2 :]) <= 2 * float32_error(model, ids[0], expected[0])


def test_interleaved_texts_do_not_disturb_each_other():
    model = tiny_model(attention="sdpa")
    texts = [some_ids(1, 12, seed=seed) for seed in (1, 2)]
    caches = [model.new_cache(1, 12) for _ in texts]
    steps = [[], []]
    for t in range(12):
        for text, cache, logits in zip(texts, caches, steps, strict=True):
            logits.append(model(text[:, t : t + 1], cache))
    for text, logits in zip(texts, steps, strict=True):
        alone = model.new_cache(1, 12)
        expected = [model(text[:, t : t + 1], alone) for t in range(12)]
        assert torch.equal(torch.cat(logits), torch.cat(expected))


@kernels
def test_gqa_equals_mha_with_repeated_kv_heads(attention):
    # Fails when KV heads are tiled (0 1 0 1) where they must be repeated (0 0 1 1).
    gqa, ids = tiny_model(attention=attention), some_ids(1, T)
    mha = tiny_model(attention=attention, num_key_value_heads=8)
    weights = gqa.state_dict()
    for name in list(weights):
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].view(2, 8, 64).repeat_interleave(4, dim=0).view(64, 64)
    mha.load_state_dict(weights)
    assert_within_2_eps(gqa, ids[0], mha(ids)[0], gqa(ids)[0])


@kernels
def test_permuting_mlp_neurons_or_kv_groups_changes_nothing(attention):
    model, ids = tiny_model(attention=attention), some_ids(1, T)
    expected = model(ids)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    neurons = torch.randperm(176, generator=torch.Generator().manual_seed(0))
    for name, tensor in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = tensor[neurons]
        elif "down_proj" in name:
            weights[name] = tensor[:, neurons]
        elif "q_proj" in name or "k_proj" in name or "v_proj" in name:
            weights[name] = tensor.view(2, -1, 64).flip(0).reshape(tensor.shape)
        elif "o_proj" in name:
            weights[name] = tensor.view(64, 2, -1).flip(1).reshape(64, 64)
    permuted = tiny_model(attention=attention)
    permuted.load_state_dict(weights)
    assert_within_2_eps(model, ids[0], permuted(ids)[0], expected)


def test_blocks_that_write_nothing_leave_head_of_norm_of_embedding():
    model, ids = tiny_model(), some_ids(2, T)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
    assert torch.equal(model(ids), model.lm_head(model.norm(model.embed_tokens(ids))))


def test_rms_norm_is_its_formula_and_ignores_scale_at_eps_zero():
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(64, 1e-3).double()
    norm.weight.uniform_(0.1, 2.1, generator=torch.Generator().manual_seed(1))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-14, rtol=1e-14)
    norm.eps = 0.0
    torch.testing.assert_close(norm(1000 * x), norm(x), atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_is_finite_for_values_whose_square_overflows(dtype):
    x = torch.full((1, 64), 6e4, dtype=dtype)
    x[:, ::2] *= -1
    assert torch.equal(RMSNorm(64, 1e-5).to(dtype)(x).abs(), torch.ones(1, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_model_keeps_its_dtype(dtype):
    assert tiny_model(dtype=dtype)(some_ids(1, 4)).dtype == dtype


def test_tinyllama_has_the_parameters_of_the_official_checkpoint():
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    assert model.num_parameters() == sum(LlamaConfig().parameters.values()) == 1_100_048_384
    assert "layers.21.self_attn.k_proj.weight" in model.state_dict()


def test_a_tied_head_is_the_embedding_and_counts_once():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    config = tiny_config(tie_word_embeddings=True)
    assert model.num_parameters() == sum(config.parameters.values())


def test_attention_can_be_set_for_some_layers_only():
    model = tiny_model(attention="sdpa")
    model.set_attention(KERNELS["eager"], layers=[1, 3])
    assert [layer.self_attn.kernel.__name__ for layer in model.layers] == ["sdpa", "eager", "sdpa", "eager"]
    with pytest.raises(InputError, match="layers: expected 0 to 3, got 4"):
        model.set_attention(KERNELS["eager"], layers=[4])
