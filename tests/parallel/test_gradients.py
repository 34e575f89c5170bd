"""Gradients of a shared model: those of one process, whoever has the weight."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tinyllama
from tests.parallel.test_exact import model_with
from tests.parallel.together import Threads, in_threads
from tests.shapes import some_ids
from tinyllama.model import Llama
from tinyllama.parity.gradients import compare_gradients
from tinyllama.parity.scene import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
# Ranks, split, stages: replicas of KV heads, pipelines, and both.
WAYS = [
    (2, "exact", 1),
    (2, "fast", 1),
    (5, "exact", 1),
    (3, "exact", 3),
    (4, "fast", 2),
    (8, "exact", 2),
]
IDS = some_ids(2, 9)
# Of float64, whose sums the ranks add in another order.
ROUNDING = 1e-12


def loss(model: Llama) -> Tensor:
    return F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


@torch.enable_grad()
def gradients(model: Llama) -> dict[str, Tensor]:
    """Of the loss; whole, by the names of one process."""
    loss(model).backward()
    return collected(model)


def collected(model: Llama) -> dict[str, Tensor]:
    """The gradients that the weights have, whole; they have none afterwards."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name if model.sharing is None else model.sharing.name(name)] = grad
        parameter.grad = None
    return found if model.sharing is None else model.sharing.whole_weights(found)


def double(**changes: Any) -> Llama:
    return model_with(**{**SHAPE, **changes}).to(torch.float64)


@pytest.mark.parametrize(("size", "split", "stages"), WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_has_the_gradient_of_one_process(size, split, stages, tied):
    model = double(tie_word_embeddings=tied)
    one = gradients(model)
    found = in_threads(model, size, gradients, split, stages)
    for whole in found:
        assert whole.keys() == one.keys()
        for name, right in one.items():
            assert relative_error(whole[name], right) < ROUNDING, name
            assert torch.equal(whole[name], found[0][name]), name


@pytest.mark.parametrize(("size", "split", "stages"), WAYS[:5])
def test_gradients_reach_a_layer_when_nothing_below_it_learns(size, split, stages):
    """A rank of another stage has no weight that asks for them, and must send them all the same."""
    model = double()
    model.requires_grad_(False)
    model.layers[1].requires_grad_(True)
    one = gradients(model)
    for whole in in_threads(model, size, gradients, split, stages):
        for name, right in one.items():
            assert relative_error(whole[name], right) < ROUNDING if right.any() else not whole[name].any()


@pytest.mark.parametrize(("size", "split", "stages"), WAYS[:5])
def test_gradients_flow_through_captured_and_patched_values(size, split, stages):
    model = double()

    @torch.enable_grad()
    def of_patched(part: Llama) -> dict[str, Tensor]:
        flipped = {"layers.1.self_attn.z": lambda z: z.flip(1)}  # mixes heads of several ranks
        with tinyllama.patch(part, flipped, whole=True):
            return gradients(part)

    one = of_patched(model)
    for whole in in_threads(model, size, of_patched, split, stages):
        for name, right in one.items():
            assert relative_error(whole[name], right) < ROUNDING, name


def test_float32_gradients_are_within_twice_the_error_of_transformers():
    model = model_with(num_attention_heads=8, num_key_value_heads=4)
    text = IDS[0].tolist()

    @torch.enable_grad()
    def of_text(part: Llama) -> dict[str, Tensor]:
        F.cross_entropy(part(IDS[:1])[0, :-1], IDS[0, 1:]).backward()
        return collected(part)

    wide = copy.deepcopy(model).to(torch.float64)
    F.cross_entropy(wide(IDS[:1])[0, :-1], IDS[0, 1:]).backward()
    truth = collected(wide)
    limits = {row.weight: row.limit for row in compare_gradients(model, text)}
    for split in ("exact", "fast"):
        (found, _) = in_threads(model, 2, of_text, split)
        for name, right in truth.items():
            assert relative_error(found[name], right) <= limits[name], (split, name)


def test_nothing_is_recorded_where_ranks_share_the_query_heads_of_a_group():
    def recorded(part: Llama) -> bool:
        with torch.enable_grad():
            return part(IDS).requires_grad

    assert in_threads(model_with(**SHAPE), 6, recorded, "fast") == [False] * 6


BACKWARD = threading.Event()


class Unadded(Threads):
    """Each rank takes its own term for the sum of all."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        every = super().gather(x, widths)
        return [x] * self.size if BACKWARD.is_set() else every


class Unsent(Threads):
    """The gradient of another stage does not come."""

    def send(self, x: Tensor, source: int) -> Tensor:
        sent = super().send(x, source)
        return x if BACKWARD.is_set() else sent


@pytest.mark.parametrize(("kind", "stages"), [(Unadded, 1), (Unsent, 2)])
def test_a_gradient_that_is_not_sent_is_seen(kind, stages):
    model = double()

    @torch.enable_grad()
    def broken(part: Llama) -> dict[str, Tensor]:
        total = loss(part)
        ranks = part.sharing.ranks
        ranks.meeting.exchange(ranks.rank, None)  # all have computed the loss
        BACKWARD.set()
        total.backward()
        ranks.meeting.exchange(ranks.rank, None)
        BACKWARD.clear()
        ranks.meeting.exchange(ranks.rank, None)
        return collected(part)

    one = gradients(model)
    (found, _) = in_threads(model, 2, broken, stages=stages, kind=kind)
    assert any(relative_error(found[name], right) > 0.01 for name, right in one.items())
