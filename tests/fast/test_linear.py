"""The matrix-vector product that decoding lives on, against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F

from tinyllama.fast.split_linear import Linear


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1), (1, 5)])
@pytest.mark.parametrize("out_features", [1, 7, 48, 320, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_is_the_linear_function_for_one_vector_and_for_many(shape, out_features, dtype):
    linear, x = Linear(96, out_features).to(dtype), random(*shape, 96).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(random(out_features, 96, seed=1))
        expected, got = F.linear(x, linear.weight), linear(x)
    assert got.shape == (*shape, out_features)
    assert got.dtype == dtype
    # float32's ceiling on relRMS for one vector; for many, and in 16 bits, it is PyTorch's own function.
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_gradients_flow_through_the_batch_of_parts():
    linear, x = Linear(96, 48), random(1, 1, 96).requires_grad_()
    linear(x).square().sum().backward()
    weight, vector = linear.weight.detach(), x.detach().flatten()
    y = weight @ vector
    torch.testing.assert_close(linear.weight.grad, 2 * y[:, None] * vector[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.flatten(), 2 * weight.T @ y, atol=1e-5, rtol=1e-5)


def test_it_has_the_checkpoints_weight_and_nothing_else():
    assert {name: tuple(tensor.shape) for name, tensor in Linear(96, 48).state_dict().items()} == {
        "weight": (48, 96)
    }
