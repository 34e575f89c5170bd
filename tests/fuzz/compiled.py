"""One call of a compiled operation: refused with ValueError, or equal to the plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllama.fast import build, native


def call(spec: dict[str, Any]) -> None:
    """Make the tensors that `spec` describes, and call; raises AssertionError where the result is wrong."""
    weight, x, scales = (tensor(spec[name], seed) for seed, name in enumerate(("weight", "x", "scales")))
    try:
        if spec["name"] == "rms_norm":
            norm = weight[0] if weight.dim() and len(weight) else weight
            if x.dtype in native.ACTIVATIONS:
                build.norm(x.dtype).ready(wait=60)
            got = native.rms_norm(x, norm, 1e-5, plain=spec["plain"])
            mean = x.float().square().mean(-1, keepdim=True)
            expected = norm.float() * (x.float() * torch.rsqrt(mean + 1e-5)).to(x.dtype)
        else:
            if weight.dtype in native.WEIGHTS and x.dtype in native.ACTIVATIONS:
                build.products(weight.dtype, x.dtype).ready(wait=60)
            got = native.linear(weight, scales if spec["scaled"] else None, x, plain=spec["plain"])
            whole = weight.float()
            if spec["scaled"]:
                whole = (whole.unflatten(1, (-1, build.GROUP)) * scales.float()[..., None]).flatten(1)
            expected = x.float() @ whole.T
    except ValueError:
        return
    assert got.shape == expected.shape, (got.shape, expected.shape)
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    assert error <= 0.02 * (expected.abs().max().item() if got.numel() else 1) + 1e-4, error


def tensor(spec: dict[str, Any], seed: int) -> Tensor:
    """A tensor of that shape and dtype, laid out in that way."""
    shape, dtype, how = spec["shape"], getattr(torch, spec["dtype"]), spec["how"]
    if how == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(seed)
    if how == "transposed" and len(shape) > 1:
        shape = [*shape[:-2], shape[-1], shape[-2]]
    if how == "strided" and shape:
        shape = [*shape[:-1], 2 * shape[-1]]
    values = (torch.randn(shape, generator=generator) * (9 if dtype == torch.int8 else 1)).to(dtype)
    if how == "transposed" and len(shape) > 1:
        return values.transpose(-1, -2)
    if how == "strided" and shape:
        return values[..., ::2]
    return values[:1].expand(shape) if how == "expanded" and shape and shape[0] else values
