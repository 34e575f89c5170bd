"""The decode step as one graph, for GPUs: there a step is some thousand small kernels, and to start them
takes longer than to run them.

The model is the one that you read; this adds no line to it. What the graph needs, the model has: shapes that
never change (the whole cache, behind a mask), positions as a tensor, nothing that waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllama.cache import KVCache
from tinyllama.model import Llama


class CompiledStep:
    """`model(ids, cache, positions)` for one new token in each row, compiled on first use.

    On a GPU the graph is recorded once and then started as a whole (CUDA graphs).
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        on_gpu = cache.keys.device.type == "cuda"
        # A recorded graph writes where it wrote the first time; it has to know that the cache stays there.
        for tensor in (cache.keys, cache.values):
            torch._dynamo.mark_static_address(tensor)
        self._step = torch.compile(
            self._forward, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else "default"
        )

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._model(ids, self._cache, positions)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions, each (B, 1) -> logits (B, 1, V), which the next call may overwrite."""
        return self._step(ids, positions)
