"""Linear layers for speed: weights stay in the 16 or 8 bits they have in memory until they are used.

Decoding is limited by reading the weights from memory, so half the bytes is twice the speed. Activations keep
their own dtype: in float32 the result is that of float32 weights but for the order of additions, for a 16-bit
number is a float32 number, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.fast import native
from tinyllama.fast.native import GROUP

# What of W is widened at once for PyTorch's product, little enough to stay in the cache; and what is rounded:
# while a model loads, larger temporaries leave holes between its tensors, up to a fifth of them.
ROWS = 512
ROUNDED_ROWS = 64


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
        if not self.compiled(x):
            return self._product(x)
        return native.linear(weight, scales, x.contiguous())

    def compiled(self, x: Tensor) -> bool:
        """Whether compiled code can and should do it."""
        return (
            (native.few(x.numel() // self.in_features) or not native.pytorch_is_faster(x.dtype))
            and x.is_cpu
            and x.dtype != torch.float64
            and self.in_features % GROUP == 0
            and not x.requires_grad  # compiled code has no backward pass
            and native.available()
        )

    def _product(self, x: Tensor) -> Tensor:
        """PyTorch's."""
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight)
        parts = [slice(at, at + ROWS) for at in range(0, self.out_features, ROWS)]
        return torch.cat([F.linear(x, self.widened(rows, x.dtype)) for rows in parts], dim=-1)

    def widened(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of W in a floating dtype."""
        return self.weight[rows].to(dtype)

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

    def widened(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of W in a floating dtype."""
        assert self.scales is not None
        groups = self.weight[rows].unflatten(1, (-1, GROUP)).to(dtype)
        return groups.mul_(self.scales[rows, :, None].to(dtype)).flatten(1)


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
