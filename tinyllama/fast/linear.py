"""Linear layers for speed: weights stay in the 16 or 8 bits they have in memory until they are used.

Decoding is limited by reading the weights from memory, so half the bytes give twice the speed. Activations
keep their own dtype. In float32 the result is that of float32 weights but for the order of additions, because
every 16-bit number is a float32 number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.fast import build, native
from tinyllama.fast.build import GROUP
from tinyllama.fast.claims import Claim
from tinyllama.fast.threads import team

# Rows of W that are widened at once for PyTorch's product: few enough to stay in the cache.
WIDENED_ROWS = 512
# Rows that are rounded at once: larger temporaries leave holes between the tensors of a loading model, up to
# a fifth of their size.
ROUNDED_ROWS = 64


class FastLinear(nn.Module):
    """y = W x, with W in any floating dtype and y in the dtype of x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # A module looks up its tensors in 0.4 microseconds, and a token needs 155 layers: so not self.weight.
        weight, scales = self._parameters["weight"], self._parameters.get("scales")
        assert weight is not None
        if not self.uses_compiled(x):
            return self.python(weight, scales, x)
        if x.dtype == torch.float16:
            return native.linear(weight, scales, x.float()).to(x.dtype)
        return native.linear(weight, scales, x)

    def uses_compiled(self, x: Tensor) -> bool:
        """Whether compiled code computes this product: not for gradients, and where it is the faster one."""
        weight = self._parameters["weight"]
        assert weight is not None
        return (
            x.is_cpu
            and weight.is_cpu
            and x.dtype != torch.float64
            and self.in_features % GROUP == 0
            and not (x.requires_grad and torch.is_grad_enabled())
            and (x.numel() <= native.FEW * self.in_features or not native.pytorch_is_faster(x.dtype))
            and claim(weight.dtype, compute_dtype(x.dtype)).holds
        )

    @staticmethod
    def python(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
        """The same product by PyTorch; the arguments are those of `native.linear`."""
        if x.dtype == weight.dtype:
            return F.linear(x, weight)
        parts = range(0, len(weight), WIDENED_ROWS)
        return torch.cat(
            [F.linear(x, widened(weight, scales, slice(at, at + WIDENED_ROWS), x.dtype)) for at in parts], -1
        )

    def extra_repr(self) -> str:
        """Shape and dtype, for print(model)."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={dtype}"


class Int8Linear(FastLinear):
    """y = W x with weights of 8 bits and one scale for 64 of a row: 8.25 bits a weight.

    W[r, c] is weight[r, c] * scales[r, c // 64]. Weights alone are rounded, never x.
    """

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__(weight)
        self.scales = nn.Parameter(scales, requires_grad=False)


class SplitLinear(nn.Linear):
    """`nn.Linear` with the same bits, which decodes float32 on a CPU 1.6 times as fast.

    PyTorch runs a float32 matrix-vector product on one core, but a batch of them on all. So the rows of W are
    taken as a batch of smaller matrices: a view, no copy, and the same dot products.
    """

    PARTS = 64  # more than cores, so that each has work
    # With parts of a multiple of 16 rows, of more than 24 columns, the sums were the same to the bit.
    ROWS, COLUMNS = 16, 32

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        parts = math.gcd(self.out_features // self.ROWS, self.PARTS)
        if (
            x.numel() != self.in_features
            or x.dtype.itemsize < 4
            or self.out_features % self.ROWS
            or self.in_features < self.COLUMNS
            or parts == 1
            or not split_claim().holds
        ):
            return super().forward(x)
        return split_product(x, self.weight, parts)


def split_product(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """W x for one vector x, the rows of W taken in parts."""
    split = weight.view(parts, -1, weight.shape[1])
    y = x.reshape(1, 1, -1).expand(parts, -1, -1) @ split.transpose(1, 2)  # (parts, 1, rows)
    return y.reshape(*x.shape[:-1], len(weight))


def widened(weight: Tensor, scales: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of W in a floating dtype."""
    part = weight[rows].to(dtype)
    if scales is None:
        return part
    return (part.unflatten(1, (-1, GROUP)) * scales[rows, :, None].to(dtype)).flatten(1)


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """In what compiled code takes such activations."""
    return torch.float32 if activations == torch.float16 else activations


@cache
def claim(weights: torch.dtype, activations: torch.dtype) -> Claim:
    """That compiled products with weights and activations of those dtypes are PyTorch's."""

    def trials() -> Iterator[tuple[object, ...]]:
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(200, 4 * GROUP, generator=random)
        stored, scales = quantise(weight) if weights == torch.int8 else (weight.to(weights), None)
        for n in (1, 3, native.FEW + 5):
            yield stored, scales, torch.randn(n, 4 * GROUP, generator=random).to(activations)

    return Claim(
        "matrix products run", build.products(weights, activations), trials, FastLinear.python, native.linear
    )


@cache
def split_claim() -> Claim:
    """That a split product is that of `nn.Linear`."""
    plain = nn.Linear(64, 48, bias=False)

    def trials() -> Iterator[tuple[object, ...]]:
        yield (torch.randn(1, 64, generator=torch.Generator().manual_seed(0)),)

    return Claim("split products run", None, trials, plain, lambda x: split_product(x, plain.weight, 3))


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 8 bits: the largest of each 64 weights becomes 127 or -127, zero stays zero.

    Args:
        weight: (rows, cols), cols a multiple of 64.

    Returns:
        int8 weights (rows, cols) and bfloat16 scales (rows, cols / 64); see `Int8Linear`.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // GROUP, dtype=torch.bfloat16, device=weight.device)
    for at in range(0, len(weight), ROUNDED_ROWS):
        part = slice(at, at + ROUNDED_ROWS)
        with team.at_work():
            groups = weight[part].to(torch.float32, copy=True).unflatten(1, (-1, GROUP))
            low, high = groups.aminmax(dim=-1)
            # Rounded before they are used: then rounding the scales costs only a little of the range.
            scales[part] = torch.maximum(-low, high) / 127
            steps = scales[part].float()[..., None]
            # In place: taking fresh memory would cost more than the arithmetic.
            groups.div_(steps.masked_fill_(steps == 0, 1)).round_().clamp_(-127, 127)
            values[part] = groups.flatten(1)
    return values, scales
