"""Gradients of every weight are transformers' own, and a wrong backward pass is noticed."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import tinyllama.model
from tests.shapes import some_ids, tiny_model
from tinyllama.parity.changed import changed
from tinyllama.parity.gradients import compare_gradients

IDS = some_ids(1, 64)[0].tolist()


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}])
def test_gradients_of_every_weight_equal_transformers_bit_for_bit(shape):
    model = tiny_model(**shape)
    rows = compare_gradients(model, IDS)
    assert [row.weight for row in rows] == [name for name, _ in model.named_parameters()]
    for row in rows:
        assert row.passed, row
        assert row.same_bits, row
        assert 0 < row.relative < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


class Silu(torch.autograd.Function):
    """SiLU with a derivative that lacks the sigmoid's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid()


@pytest.mark.parametrize("silu", [Silu.apply, lambda x: F.silu(x.detach()) + 0 * x], ids=["wrong", "none"])
def test_a_wrong_derivative_fails_though_the_values_are_right(silu):
    with changed((tinyllama.model, "F", SimpleNamespace(silu=silu))):
        failed = {row.weight for row in compare_gradients(tiny_model(), IDS) if not row.passed}
    assert {"layers.0.mlp.gate_proj.weight", "layers.3.mlp.gate_proj.weight"} <= failed
    # The gradients of what comes after the last SiLU stay right.
    assert not failed & {"lm_head.weight", "norm.weight", "layers.3.mlp.down_proj.weight"}
