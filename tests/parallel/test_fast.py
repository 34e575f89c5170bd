"""The fast split: it equals the same sums in one process to the bit, and the oracle to rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, starmap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parallel.test_exact import WIDE
from tests.parallel.together import Threads, in_threads
from tests.shapes import some_ids, tiny_model
from tinyllama.model import Llama
from tinyllama.parallel.plan import MODES, Plan, owners, times
from tinyllama.parity import compare, oracle_logits
from tinyllama.parity.comparison import Comparison
from tinyllama.parity.reference import config_fields, reference_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(8, 4, 2), (9, 3, 2), (9, 3, 3), (8, 2, 8), (6, 1, 4)]


class InParts(nn.Module):
    """W x, as several products of some columns of W each, added in float32 from left to right."""

    def __init__(self, weight: Tensor, columns: list[range]) -> None:
        super().__init__()
        self.weight, self.columns = weight, columns

    def forward(self, x: Tensor) -> Tensor:
        places = [slice(part.start, part.stop) for part in self.columns]
        parts = [
            F.linear(x[..., place].float().contiguous(), self.weight[:, place].float().contiguous())
            for place in places
        ]
        total = parts[0]
        for one in parts[1:]:
            total = total + one
        return total.to(x.dtype)


def simulated(model: Llama, size: int) -> Llama:
    """One process that adds up what `size` ranks would add up."""
    model = copy.deepcopy(model)
    H, K, D = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    # Written without the plan for the common case: whole groups, one after the other.
    if size <= K:
        ends = [K * rank // size * (H // K) * D for rank in range(size + 1)]
        columns = list(starmap(range, pairwise(ends)))
    else:
        heads = times(Plan.of(model.config, size, "fast").heads, D)
        columns = [heads[rank] for rank in owners(heads)]
    units = -(-model.config.intermediate_size // 64)
    ends = [64 * (units * rank // size) for rank in range(size + 1)]
    widths = list(starmap(range, pairwise(ends)))
    for path, module in list(model.named_modules()):
        if path.endswith(("o_proj", "down_proj")):
            parts = columns if path.endswith("o_proj") else widths
            model.set_submodule(path, InParts(module.get_parameter("weight"), parts))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_it_equals_its_simulation_to_the_bit(heads, kv_heads, size, dtype):
    model = tiny_model(dtype=dtype, **{**WIDE, "num_attention_heads": heads, "num_key_value_heads": kv_heads})
    texts = [some_ids(1, 1), some_ids(2, 5), some_ids(1, 40)]

    def logits(part: Llama) -> list[Tensor]:
        cache = part.new_cache(1, 8)
        steps = [part(some_ids(1, n, seed=n), cache) for n in (5, 1, 1)]
        return [part(text) for text in texts] + steps

    with torch.no_grad():
        expected = logits(simulated(model, size))
        one = logits(model)
    for found in in_threads(model, size, logits, mode="fast"):
        assert all(map(torch.equal, found, expected))
    assert dtype == torch.bfloat16 or not all(map(torch.equal, one, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes_the_oracle(dtype):
    model, ids = tiny_model(dtype=dtype, **WIDE), some_ids(1, 64)
    for logits in in_threads(model, 4, lambda part: part(ids), mode="fast"):
        assert judged(model, logits, ids).verdict.passed


def judged(model: Llama, logits: Tensor, ids: Tensor) -> Comparison:
    """Beside transformers' own error, as parity.py judges."""
    text = ids[0].tolist()
    truth = oracle_logits(config_fields(model.config), model.state_dict(), text)
    return compare(lambda _: logits, reference_model(model, "eager"), text, truth, model.dtype)


class OwnAlone(Threads):
    """No word is sent: each rank takes its own value for everyone's."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        return [x[..., :1].expand(*x.shape[:-1], width) if width != x.shape[-1] else x for width in widths]


class Reversed(Threads):
    """Ranks in the wrong order."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        return super().gather(x, widths)[::-1]


class FirstTwice(Threads):
    """Rank 0 is heard twice, and the last one never."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        every = super().gather(x, widths)
        return [every[0], *every[:-1]]


BUGS: dict[str, dict[str, Any]] = {
    "wrong KV group": {"narrowed": lambda plan: replace(plan, kv_heads=plan.kv_heads[::-1])},
    "wrong query heads": {"narrowed": lambda plan: replace(plan, heads=plan.heads[::-1])},
    "MLP channels in another order": {"narrowed": lambda plan: replace(plan, mlp=plan.mlp[::-1])},
    "a shard read twice": {"part_of": lambda rank: 0},
    "no gather": {"kind": OwnAlone},
    "ranks in the wrong order": {"kind": Reversed},
    "a rank heard twice": {"kind": FirstTwice},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, mode):
    model, ids = tiny_model(**WIDE, num_key_value_heads=4), some_ids(1, 64)
    with torch.no_grad():
        one = model(ids)
    found = in_threads(model, 2, lambda part: part(ids), mode, **BUGS[bug])
    if (bug, mode) == ("MLP channels in another order", "fast"):  # a sum, in another order: no bug
        assert judged(model, found[0], ids).verdict.passed
        return
    assert not torch.equal(found[0], one)
    assert not judged(model, found[0], ids).verdict.passed
