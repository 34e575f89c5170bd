"""What the machine itself can do: bytes read and products computed in a second, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F

from tinyllama.fast.linear import FastLinear

BYTES = 1_000_000_000
SUMS = 5
# Rows, inner size and outer size of the product: TinyLlama's up projection in a long prefill.
PRODUCT = (1024, 2048, 5632)
GPU_PRODUCT = (8192, 8192, 8192)


def timed(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that the action took, on a GPU until it is done."""
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


class Memory:
    """Reads 1 GB with every core, or copies it within a GPU; `bandwidth` is in bytes a second."""

    def __init__(self, device: torch.device, size: int = 0) -> None:
        self.device = device
        self.values = torch.ones((size or BYTES) // 4, device=device)
        self.copy = torch.empty_like(self.values) if device.type == "cuda" else None

    def bandwidth(self) -> float:
        """The median of a few passes; a copy both reads and writes."""
        copy = self.copy
        moved = self.values.nbytes * (1 if copy is None else 2)
        action = self.values.sum if copy is None else lambda: copy.copy_(self.values)
        return moved / median(timed(action, self.device) for _ in range(SUMS))


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of one large product in that dtype, PyTorch's or, if faster, ours.

    A multiply-add is two operations.
    """
    rows, inner, outer = GPU_PRODUCT if device.type == "cuda" else PRODUCT
    x, w = (torch.ones(n, inner, device=device, dtype=dtype) for n in (rows, outer))
    ours = FastLinear(w)
    seconds = [
        timed(partial(way, x), device) for way in (partial(F.linear, weight=w), ours) for _ in range(3)
    ]
    return 2 * rows * inner * outer / min(seconds)
