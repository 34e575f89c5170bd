"""Matrix products by the ways that there are: what each gives for one vector, a few, and a prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.bench.limits import timed
from tinyllama.bench.ours import weight_bytes
from tinyllama.bench.tables import heading, table
from tinyllama.fast import native
from tinyllama.fast.linear import FastLinear, quantise

Figures = dict[str, Any]
Way = Callable[[Tensor], Tensor]

VECTORS = (1, 2, 4, 8, 16, 32, 64, 512)
MATRICES = 20  # so many that they come from memory, not from the processor's cache


class _Functional(nn.Module):
    """PyTorch's own, in the dtype of its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


class _Compiled(FastLinear):
    """One of the two compiled products, for any number of vectors of activations of that dtype."""

    def __init__(
        self, name: str, weight: Tensor, scales: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(weight)
        self.name, self.dtype = name, dtype
        self.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(native, self.name)(self.weight, self.scales, x.to(self.dtype))


def _plain(weight: Tensor) -> nn.Module:
    layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


WAYS: dict[str, Callable[[Tensor], nn.Module]] = {
    "float32, F.linear": _Functional,
    "float32, linear.py": _plain,
    "float32, matvec.c": partial(_Compiled, "matvec"),
    "float32, matmul.c": partial(_Compiled, "matmul"),
    "bfloat16, F.linear": lambda weight: _Functional(weight.bfloat16()),
    "bfloat16, matvec.c": lambda weight: _Compiled("matvec", weight.bfloat16(), dtype=torch.bfloat16),
    "bfloat16, matmul.c": lambda weight: _Compiled("matmul", weight.bfloat16(), dtype=torch.bfloat16),
    "float16, F.linear": lambda weight: _Functional(weight.half()),
    "bfloat16 weights, matvec.c": lambda weight: _Compiled("matvec", weight.bfloat16()),
    "bfloat16 weights, matmul.c": lambda weight: _Compiled("matmul", weight.bfloat16()),
    "int8 weights, matvec.c": lambda weight: _Compiled("matvec", *quantise(weight)),
    "int8 weights, matmul.c": lambda weight: _Compiled("matmul", *quantise(weight)),
}


@torch.inference_mode()
def products(
    rows: int,
    cols: int,
    rounds: int,
    bandwidth: Callable[[], float],
    step: Callable[[str], None],
    matrices: int = MATRICES,
) -> Figures:
    """Multiply vectors with matrices of that shape, one way after another.

    Args:
        rows: of a matrix.
        cols: of a matrix.
        rounds: that count; one more comes first.
        bandwidth: measures it, beside each round.
        step: told of each way that is done.
        matrices: how many there are, to come from memory.

    Returns:
        `bandwidth`, bytes a second; and `ways`: name, `bytes` of a matrix, and for each number of vectors the
        median `seconds` of one matrix.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, cols, generator=generator) for _ in range(matrices)]
    taken: dict[str, dict[int, list[float]]] = {name: {n: [] for n in VECTORS} for name in WAYS}
    size: dict[str, float] = {}
    read = []
    for name, way in WAYS.items():
        # One way after another, for all of them at once would not fit; the bandwidth is measured beside each.
        layers = [way(weight) for weight in weights]
        size[name] = weight_bytes(layers[0])
        for turn in range(rounds + 1):
            read.append(bandwidth())
            for n in VECTORS:
                x = torch.randn(n, cols, generator=generator)
                seconds = timed(partial(_each, layers, x)) / matrices
                if turn:
                    taken[name][n].append(seconds)
        step(name)
    return {
        "shape": [rows, cols],
        "bandwidth": median(read),
        "ways": [
            {"name": name, "bytes": size[name], "seconds": {n: median(s) for n, s in by_count.items()}}
            for name, by_count in taken.items()
        ],
    }


def _each(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def show_products(console: Console, results: Figures) -> None:
    """A table: GB/s for one vector, then milliseconds for each number of them."""
    heading(console, results)
    found = results["products"]
    rows, cols = found["shape"]
    console.print(
        f"y = W x, W ({rows}, {cols}), milliseconds for so many vectors; read bandwidth "
        f"{found['bandwidth'] / 1e9:.1f} GB/s"
    )
    made = table("weights, way", "GB/s at 1", *map(str, VECTORS))
    for way in found["ways"]:
        seconds = way["seconds"]
        made.add_row(
            way["name"],
            f"{way['bytes'] / seconds[1] / 1e9:.1f}",
            *(f"{s * 1e3:.2f}" for s in seconds.values()),
        )
    console.print(made)
