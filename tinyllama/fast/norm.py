"""`RMSNorm`, compiled: one operation instead of PyTorch's six."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from tinyllama.fast import build, native
from tinyllama.fast.claims import Claim
from tinyllama.model import RMSNorm

C = 96  # channels of the trials
PYTHON = RMSNorm.forward


class FastRMSNorm(RMSNorm):
    """RMSNorm in one pass over x, where its claim holds; otherwise what `RMSNorm` does."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; (..., C) -> (..., C)."""
        weight = self._parameters["weight"]
        assert weight is not None
        if (
            x.dtype in native.ACTIVATIONS
            and x.is_cpu
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and claim(x.dtype).holds
            and RMSNorm.forward is PYTHON  # a notebook may have replaced it since the claim was checked
        ):
            return native.rms_norm(x, weight, self.eps)
        return super().forward(x)


@cache
def claim(dtype: torch.dtype) -> Claim:
    """That the compiled norm of that dtype is `RMSNorm`."""

    def trials() -> Iterator[tuple[object, ...]]:
        random = torch.Generator().manual_seed(0)
        # Of ordinary size, and so small that eps counts.
        for rows, size in ((1, 1.0), (3, 3e-3)):
            x = size * torch.randn(1, rows, C, generator=random)
            yield x.to(dtype), (0.1 + torch.rand(C, generator=random)).to(dtype)

    def python(x: Tensor, weight: Tensor) -> Tensor:
        norm = RMSNorm(C, eps=1e-5)
        norm.weight = torch.nn.Parameter(weight)
        return norm(x)

    return Claim("norms run", build.norm(dtype), trials, python, lambda x, w: native.rms_norm(x, w, 1e-5))
