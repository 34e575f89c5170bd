"""Linear layers for speed: weights stay in the 16 or 8 bits they have in memory until they are used.

Decoding is limited by reading the weights from memory, so half the bytes is twice the speed. Activations keep
their own dtype: in float32 the result is that of float32 weights but for the order of additions, for a 16-bit
number is a float32 number, too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama import native
from tinyllama.native import GROUP

# Up to so many vectors at once go through matvec.c. There its cost is that of reading the weights; with more,
# PyTorch's matrix-matrix products overtake it, soonest where they need not widen the weights first
# (python scripts/bench.py --products).
MOST_VECTORS = 32
MOST_VECTORS_16_BIT = 12
# PyTorch's own way to oneDNN's linear function.
ONEDNN = "_linear_pointwise"
# What of W is widened at once, little enough to stay in the cache, and what is rounded: while a model loads,
# larger temporaries leave holes between its tensors, up to a fifth of them.
ROWS = 512
ROUNDED_ROWS = 64
# oneDNN adds up long rows one product after another, with 2.2 times the rounding error of MKL, which over a
# model is too much; for parts of rows, whose sums are added, it is 1.6 times.
COLUMNS = 1024
ALL = slice(None)


class FastLinear(nn.Module):
    """y = W x, W in the floating dtype it is given in, y in the dtype of x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # Not self.weight: a module looks its tensors up in 0.4 microseconds, and a token needs 155 layers.
        weight, scales = self._parameters["weight"], self._parameters.get("scales")
        assert weight is not None
        if not self._few(x, weight):
            return self._matmul(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        if x.dtype == torch.float32:
            return native.matvec(weight, scales, x.contiguous())
        return native.matvec(weight, scales, x.float().contiguous()).to(x.dtype)

    def _few(self, x: Tensor, weight: Tensor) -> bool:
        """Whether matvec.c can and should do it."""
        same = x.dtype == weight.dtype != torch.float32
        return (
            x.numel() <= (MOST_VECTORS_16_BIT if same else MOST_VECTORS) * self.in_features
            and x.is_cpu
            and x.dtype != torch.float64
            and self.in_features % GROUP == 0
            and not x.requires_grad  # compiled code has no backward pass
            and native.available()
        )

    def _matmul(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype != torch.float32:
            return F.linear(x, self.weight)
        wide = x.dtype.itemsize >= 4  # sums of parts would be rounded to 16 bits one by one
        columns = [slice(at, at + COLUMNS) for at in range(0, self.in_features, COLUMNS)] if wide else [ALL]
        parts = [x[:, part].contiguous() for part in columns]
        y = []
        for at in range(0, self.out_features, ROWS):
            rows = slice(at, at + ROWS)
            products = (
                matmul(values, self.widened(rows, x.dtype, part))
                for values, part in zip(parts, columns, strict=True)
            )
            y.append(functools.reduce(torch.add, products))
        return torch.cat(y, dim=1)

    def widened(self, rows: slice, dtype: torch.dtype, columns: slice = ALL) -> Tensor:
        """Part of W in a floating dtype; columns in whole groups."""
        return self.weight[rows, columns].to(dtype)

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

    def widened(self, rows: slice, dtype: torch.dtype, columns: slice = ALL) -> Tensor:
        """Part of W in a floating dtype; columns in whole groups."""
        assert self.scales is not None
        groups = self.weight.unflatten(1, (-1, GROUP))[rows, _groups(columns)].to(dtype)
        return groups.mul_(self.scales[rows, _groups(columns), None].to(dtype)).flatten(1)


def _groups(columns: slice) -> slice:
    return columns if columns == ALL else slice(columns.start // GROUP, columns.stop // GROUP)


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
        groups = weight[part].to(torch.float32, copy=True).unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=-1)
        # Rounded before they are used, so that rounding them costs nothing but a little of the range.
        scales[part] = torch.maximum(-low, high) / 127
        steps = scales[part].float()[..., None]
        # In place, for fetching fresh memory takes longer than this arithmetic.
        groups.div_(steps.masked_fill_(steps == 0, 1)).round_().clamp_(-127, 127)
        values[part] = groups.flatten(1)
    return values, scales


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """(n, in) times (out, in) -> (n, out).

    PyTorch gives float32 to MKL; oneDNN, which it also carries, is twice as fast on an AMD EPYC. The way to
    it is not part of PyTorch's promised interface, and may be gone some day.
    """
    onednn = x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and not x.requires_grad and hasattr(torch.ops.mkldnn, ONEDNN):
        return getattr(torch.ops.mkldnn, ONEDNN)(x, weight.contiguous(), None, "none", [], "")
    return F.linear(x, weight)
