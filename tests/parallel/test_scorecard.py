"""Experiments on a shared model give the figures of one process."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.parallel.test_exact import model_with
from tests.parallel.together import in_threads
from tests.shapes import some_ids
from tinyllama.attention import eager
from tinyllama.lab import scorecard as scorecard_module
from tinyllama.lab.change import Change
from tinyllama.lab.contract import check_attention
from tinyllama.lab.figures import Extent
from tinyllama.lab.scorecard import Subject, scorecard
from tinyllama.lab.smaller_caches import quantised
from tinyllama.lab.variants import ablate, window
from tinyllama.model import Llama

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
TEXT = some_ids(1, 40)[0].tolist()
CHANGES = [
    Change("window", lambda q, k, v, context: window(q, k, v, context, size=8), (0, 2)),
    Change("ablate", ablate, (1,), (1, 4)),
    Change("quantised", quantised),
    Change("healed", eager, (1,), weights={"layers.1.mlp.down_proj.weight": torch.ones(256, 512)}),
]


@pytest.fixture(autouse=True)
def _one_clause(monkeypatch):
    """A compiler, which one clause needs, cannot run in several threads; every rank checks alike."""
    monkeypatch.setattr(scorecard_module, "check_attention", partial(check_attention, clauses=["shape"]))


class Plain:
    """Ids in place of a text."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def figures(model: Llama) -> dict[str, Any]:
    subject = Subject(model, Plain(), {"text": TEXT}, {"prompt": TEXT[:20]})  # type: ignore[arg-type]
    return asdict(scorecard(subject, CHANGES, Extent(context=16, rounds=0, new_tokens=4)))


@pytest.mark.parametrize(("size", "split", "stages"), [(2, "exact", 1), (5, "exact", 1), (4, "exact", 2)])
def test_the_scorecard_is_that_of_one_process(size, split, stages):
    model = model_with(**SHAPE)
    one = figures(model)
    assert any(figure > 0 for row in one["changes"][1]["results"]["heads_direct"] for figure in row)
    for found in in_threads(model, size, figures, split, stages):
        assert found == one


def test_in_the_fast_split_it_is_the_same_but_for_rounding():
    model = model_with(**SHAPE)
    for found in in_threads(model, 4, figures, "fast", 2):
        for mine, right in zip(found["changes"], figures(model)["changes"], strict=True):
            for name in ("layers_changed", "heads_changed", "heads_direct"):
                here, there = torch.tensor(mine["results"][name]), torch.tensor(right["results"][name])
                assert torch.allclose(here, there, atol=1e-4)
            assert mine["results"]["cache"] == right["results"]["cache"]


def test_the_weights_of_a_change_are_those_of_the_whole_model():
    model = model_with(**SHAPE)
    change = replace(CHANGES[3], weights={"layers.1.self_attn.o_proj.weight": torch.eye(256)[:, :192]})

    def changed(part: Llama) -> torch.Tensor:
        with change.applied(part):
            logits = part(some_ids(1, 5))
        assert not torch.equal(part(some_ids(1, 5)), logits)
        return logits

    with torch.no_grad():
        one = changed(model)
    for split in ("exact", "fast"):
        for logits in in_threads(model, 4, changed, split, 2):
            assert torch.equal(logits, one) if split == "exact" else torch.allclose(logits, one, atol=1e-4)
