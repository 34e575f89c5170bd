"""Values inside a shared model: a rank's own, or whole, as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tinyllama
from tests.parallel.test_exact import model_with
from tests.parallel.together import in_threads
from tests.shapes import some_ids
from tinyllama.errors import InputError
from tinyllama.model import Llama

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
EVERYWHERE = ("embed_tokens", "layers.*", "layers.*.*", "layers.*.*.*", "norm", "lm_head")
# Ranks, split, stages; more ranks of a stage than KV heads among them.
WAYS = [(2, "exact", 1), (5, "exact", 1), (3, "exact", 3), (4, "exact", 2), (4, "fast", 2)]


def captured(model: Llama, *patterns: str, whole: bool = True) -> dict[str, torch.Tensor]:
    with torch.no_grad(), tinyllama.capture(model, *patterns, whole=whole) as found:
        model(some_ids(2, 7))
    return found


@pytest.mark.parametrize(("size", "split", "stages"), WAYS)
def test_every_value_is_whole_on_every_rank(size, split, stages):
    model = model_with(**HEADS)
    one = captured(model, *EVERYWHERE)
    for found in in_threads(model, size, lambda part: captured(part, *EVERYWHERE), split, stages):
        assert found.keys() == one.keys()
        for address, value in one.items():
            assert found[address].shape == value.shape, address
            if split == "exact":
                assert torch.equal(found[address], value), address
            else:
                assert torch.allclose(found[address], value, atol=1e-4), address


def test_a_second_pass_replaces_the_values_of_the_first():
    model = model_with(**HEADS)

    def of_two_passes(part: Llama) -> dict[str, torch.Tensor]:
        with torch.no_grad(), tinyllama.capture(part, "layers.*.self_attn.z", whole=True) as found:
            part(some_ids(1, 5))
            part(some_ids(2, 7, seed=1))
        return found

    one = of_two_passes(model)
    for found in in_threads(model, 4, of_two_passes, stages=2):
        assert all(torch.equal(found[address], value) for address, value in one.items())


def test_addresses_are_those_of_one_process():
    model = model_with(**HEADS)
    for found in in_threads(model, 4, tinyllama.addresses, stages=2):
        assert found == tinyllama.addresses(model)


def test_a_rank_s_own_values_are_its_heads_and_channels():
    model = model_with(**HEADS)
    addresses = ("layers.*", "layers.1.self_attn.z", "layers.1.self_attn.o_proj", "layers.1.mlp.product")

    def own(part: Llama) -> tuple[range, dict[str, torch.Tensor]]:
        return part.attentions[1].heads, captured(part, *addresses, whole=False)

    one = captured(model, *addresses)
    parts = in_threads(model, 2, own)
    for heads, found in parts:
        for address in ("layers.0", "layers.1", "layers.1.self_attn.o_proj"):
            assert torch.equal(found[address], one[address])
        z = "layers.1.self_attn.z"
        assert torch.equal(found[z], one[z][:, heads.start : heads.stop])
    product = "layers.1.mlp.product"
    assert torch.equal(torch.cat([found[product] for _, found in parts], -1), one[product])


def test_a_value_of_another_stage_is_refused_unless_it_is_to_be_whole():
    def refused(part: Llama) -> str:
        with pytest.raises(InputError) as caught:
            captured(part, "layers.*", whole=False)
        return str(caught.value)

    first, second = in_threads(model_with(**HEADS), 2, refused, stages=2)
    assert first == (
        "layers.1: expected one of layers 0 to 0, which this rank computes; whole=True brings the others"
    )
    assert second.startswith("layers.0: expected one of layers 1 to 2")


def test_a_value_that_nobody_computes_is_refused_on_every_rank():
    def refused(part: Llama) -> str:
        part.set_attention("sdpa")
        with pytest.raises(InputError) as caught:
            captured(part, "layers.*.self_attn.pattern")
        return str(caught.value)

    for said in in_threads(model_with(**HEADS), 4, refused, stages=2):
        assert "nothing was computed there" in said


@pytest.mark.parametrize(("size", "split", "stages"), WAYS[:4])
def test_what_is_patched_counts_on_every_rank(size, split, stages):
    model = model_with(**HEADS)

    def patched(part: Llama) -> torch.Tensor:
        values: dict[str, Any] = {
            "layers.0.mlp": torch.zeros_like,
            "layers.1.self_attn.z": lambda z: z.flip(1),  # mixes heads
            "layers.2.self_attn.pattern": torch.full((1, 6, 7, 7), 1 / 7),
            "layers.2": lambda x: 2 * x,
        }
        with torch.no_grad(), tinyllama.patch(part, values, whole=True):
            return part(some_ids(1, 7))

    one = patched(model)
    assert not torch.equal(one, model(some_ids(1, 7)))
    for part in in_threads(model, size, patched, split, stages):
        assert torch.equal(part, one)


def test_a_patch_may_act_on_a_rank_s_own_part():
    model = model_with(**HEADS)

    def patched(part: Llama) -> torch.Tensor:
        heads = part.attentions[1].heads
        scaled = {"layers.1.self_attn.z": lambda z: z * torch.tensor(heads)[:, None, None]}
        with torch.no_grad(), tinyllama.patch(part, scaled):
            return part(some_ids(1, 7))

    one = patched(model)
    for part in in_threads(model, 2, patched):
        assert torch.equal(part, one)
