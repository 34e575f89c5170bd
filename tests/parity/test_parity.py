"""Our logits against transformers and the float64 oracle, and the proof that this gate can fail.

The fixture has unit-gain random weights, under which every operation matters; criteria are those of
`tinyllama.parity.judge`, relative to transformers' own error.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.shapes import LLAMA3_SCALING, some_ids, tiny_model
from tinyllama.checkpoints.load import load_model
from tinyllama.kernels import KERNELS
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.mutations import MUTATIONS, try_mutations
from tinyllama.parity.reference import config_fields, reference_model

pytestmark = pytest.mark.usefixtures("no_grad")

T = 64
IDS = some_ids(1, T)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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


@pytest.fixture(scope="module")
def trials():
    return {trial.mutation.name: trial for trial in try_mutations()}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_fails_the_gate_and_is_named(mutation, trials):
    trial = trials[mutation.name]
    if mutation.address is None:
        assert mutation.name == "positions + 1"
        assert trial.passed
        assert 0.5 < trial.score < 2
        assert trial.found is None
    else:
        assert not trial.passed
        assert trial.score > 5000
        assert (trial.found.address, trial.found.suspect) == (mutation.address, mutation.suspect)
    assert trial.right


def test_the_planted_bugs_are_sixteen_and_leave_nothing_behind(trials):
    assert len(trials) == len(MUTATIONS) == 16
    model = tiny_model()
    assert torch.equal(model(IDS), reference_model(model, "eager")(IDS).logits)


def test_a_bug_that_is_found_elsewhere_or_for_another_reason_is_not_judged_rightly(trials):
    trial = trials["eps 0"]
    for changes in ({"address": "norm"}, {"suspect": "the norm is skipped"}):
        assert not replace(trial, mutation=replace(trial.mutation, **changes)).right
    assert not replace(trial, passed=True).right
    assert not replace(trials["positions + 1"], passed=False).right


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_fails_on_nan(dtype):
    model = tiny_model(dtype=dtype)
    logits = model(IDS)
    logits[0, 3, 5] = float("nan")
    verdict, _ = measured(model, logits)
    assert not verdict.passed
