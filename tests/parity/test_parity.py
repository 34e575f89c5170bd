"""Our logits against transformers and the float64 oracle, and the proof that this gate can fail.

The fixture has unit-gain random weights, under which every operation matters; criteria are those of
`tinyllama.parity.judge`, relative to transformers' own error.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.shapes import ROPE_SCALINGS, some_ids, tiny_model
from tinyllama.checkpoints.load import load_model
from tinyllama.kernels import KERNELS
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.mutations import MUTATIONS, try_mutations
from tinyllama.parity.reference import config_fields, reference_model

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

T = 64
IDS = some_ids(1, T)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def verdict(model, logits):
    truth = oracle_logits(config_fields(model.config), model.state_dict(), IDS[0].tolist())
    theirs = [reference_model(model, name)(IDS).logits[0] for name in ("eager", "sdpa")]
    return judge(difference(logits[0], truth), [difference(logits, truth) for logits in theirs], model.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fixture_passes_in_every_dtype_and_nan_does_not(dtype):
    model = tiny_model(dtype=dtype)
    for kernel in KERNELS.values():
        model.set_attention(kernel)
        logits = model(IDS)
        assert verdict(model, logits).failures == ()
    logits[0, 3, 5] = float("nan")
    assert not verdict(model, logits).passed


SHAPES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 8},
    "MQA": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    **{
        f"{kind} RoPE": {"rope_scaling": rope, "rope_theta": 500000.0, "max_position_embeddings": 40}
        for kind, rope in ROPE_SCALINGS.items()
    },
    "head_dim unlike hidden/heads": {"head_dim": 22},
    "sliding window": {"model_type": "mistral", "sliding_window": 10},
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


@pytest.fixture(scope="module")
def trials():
    return {trial.name: trial for trial in try_mutations(MUTATIONS)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_fails_the_gate_and_is_named(mutation, trials):
    trial = trials[mutation.name]
    assert trial.right
    assert trial.harmless == trial.passed == (mutation.name == "positions + 1")
    assert 0.5 < trial.score < 2 if trial.harmless else trial.score > 5000
    assert (trial.address, trial.suspect) == (mutation.address, mutation.suspect)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_changes_the_logits_until_it_is_taken_out_again(mutation):
    model = tiny_model(num_hidden_layers=2)
    before, parts = model(IDS), [module for _, module in model.named_modules()]
    with mutation.planted(model):
        assert not torch.equal(model(IDS), before)
    assert torch.equal(model(IDS), before)
    after = [module for _, module in model.named_modules()]
    assert all(one is other for one, other in zip(after, parts, strict=True))


def test_a_bug_that_is_found_elsewhere_or_for_another_reason_is_not_judged_rightly():
    eps = MUTATIONS[0]
    wrong = [replace(eps, address="norm"), replace(eps, suspect="the norm is skipped")]
    harmless = replace(eps, address=None, suspect=None)
    assert [trial.right for trial in try_mutations([eps, *wrong, harmless])] == [True, False, False, False]
