"""The plan: every weight is covered, nothing is held twice but declared replicas, and groups stay whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.shapes import tiny_config
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.parallel.plan import MODES, Plan, owners, shares

SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "head_dim": 64}


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    """Llamas of any head counts, MQA and MHA among them, with sizes that few numbers divide."""
    K, G = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return tiny_config(
        num_attention_heads=K * G,
        num_key_value_heads=K,
        head_dim=draw(st.sampled_from([2, 8, 64])),
        hidden_size=draw(st.integers(9, 200)),
        intermediate_size=draw(st.integers(9, 300)),
        vocab_size=draw(st.integers(9, 400)),
        num_hidden_layers=1,
        tie_word_embeddings=draw(st.booleans()),
    )


def shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}


@settings(max_examples=60)
@given(configs(), st.integers(1, 9), st.sampled_from(MODES))
@example(tiny_config(**SMOLLM2), 2, "exact")
@example(LlamaConfig(num_hidden_layers=1), 8, "fast")
def test_the_parts_of_every_weight_are_the_whole_once(config, ranks, mode):
    plan = Plan.of(config, ranks, mode)
    for name, shape in shapes(config).items():
        cut = plan.cut(name)
        if cut.axis is None:
            assert "norm" in name
            continue
        assert all(cut.parts)
        assert len(cut.parts) == ranks
        covered = [row for rank in owners(cut.parts) for row in cut.parts[rank]]
        assert covered == list(range(shape[cut.axis])), name
        for rank in set(range(ranks)) - set(owners(cut.parts)):
            assert cut.parts[rank] == cut.parts[rank - 1]  # a replica


@settings(max_examples=60)
@given(configs(), st.integers(1, 4), st.sampled_from(MODES))
def test_the_layers_of_a_pipeline_are_cut_among_the_ranks_of_their_stage(config, each, mode):
    config = replace(config, num_hidden_layers=5)
    alone, plan = Plan.of(config, each, mode), Plan.of(config, 2 * each, mode, 2)
    assert [list(layers) for layers in plan.layers] == [[0, 1], [2, 3, 4]]
    for name, shape in shapes(config).items():
        cut = plan.cut(name)
        if not name.startswith("layers."):
            assert cut == Plan.of(config, 2 * each, mode).cut(name)
            continue
        stage = int(int(name.split(".")[1]) in plan.layers[1])
        for rank in range(2 * each):
            if plan.stage(rank) == stage:
                assert cut.shape(shape, rank) == alone.cut(name).shape(shape, rank % each)
            else:
                assert 0 in cut.shape(shape, rank)


@settings(max_examples=60)
@given(configs(), st.integers(1, 9), st.sampled_from(MODES))
def test_every_rank_has_query_heads_and_exactly_the_kv_heads_that_they_read(config, ranks, mode):
    plan = Plan.of(config, ranks, mode)
    G = config.num_attention_heads // config.num_key_value_heads
    for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
        assert heads
        assert {head // G for head in heads} == set(kv_heads)
        assert len(heads) % len(kv_heads) == 0  # a kernel sees whole groups
        if mode == "exact" or ranks <= config.num_key_value_heads:
            assert len(heads) == G * len(kv_heads)


@given(st.integers(0, 500), st.integers(1, 9), st.sampled_from([1, 16, 64]))
def test_shares_differ_by_no_more_than_a_unit(total, ranks, unit):
    sizes = [len(part) for part in shares(total, ranks, unit)]
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 2 * unit
    if total >= ranks:
        assert min(sizes) > 0


def test_tinyllama_on_eight_ranks_has_each_kv_head_twice():
    plan = Plan.of(LlamaConfig(), 8)
    assert [list(part) for part in plan.kv_heads] == [[0], [0], [1], [1], [2], [2], [3], [3]]
    assert [len(part) for part in plan.heads] == [8] * 8
    assert [len(part) for part in Plan.of(LlamaConfig(), 8, "fast").heads] == [4] * 8
    assert {len(part) for part in plan.mlp} == {704}


def test_smollm2_on_two_ranks_is_uneven():
    plan = Plan.of(tiny_config(**SMOLLM2), 2)
    assert [len(part) for part in plan.kv_heads] == [1, 2]
    assert [len(part) for part in plan.heads] == [3, 6]


def test_a_tied_head_is_cut_like_the_embedding_and_the_shares_are_counted():
    config = LlamaConfig()
    plan, whole = Plan.of(config, 2), shapes(config)
    assert plan.cut("lm_head.weight") == plan.cut("embed_tokens.weight")
    norms = config.parameters["norms"]
    assert plan.parameters(whole, 0) == (sum(config.parameters.values()) - norms) // 2 + norms


@pytest.mark.parametrize("arguments", [(0,), (2049,), (2, "quick"), (3, "exact", 2), (46, "exact", 23)])
def test_what_cannot_be_planned_is_refused(arguments):
    with pytest.raises(InputError):
        Plan.of(LlamaConfig(), *arguments)
