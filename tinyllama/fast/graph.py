"""The decode step as one graph, for GPUs: there a step is about a thousand small kernels, and starting them
takes longer than running them.

The model is the one that you read; this adds no line to it. The model has what the graph needs: shapes that
never change (the whole cache, behind a mask), positions as a tensor, nothing that waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinyllama.cache import KVCache
from tinyllama.model import Llama


class CompiledStep:
    """`model(ids, cache, positions)` for one new token in each row, compiled for each new cache.

    On a GPU the graph is recorded once and then started as a whole (CUDA graphs).
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._cache: KVCache | None = None
        self._step: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, ids: Tensor, cache: KVCache, positions: Tensor) -> Tensor:
        """Ids and positions, each (B, 1) -> logits (B, 1, V), which the next call may overwrite."""
        if self._step is None or cache is not self._cache:
            self._cache, self._step = cache, self._compiled(cache)
        return self._step(ids, positions)

    def _compiled(self, cache: KVCache) -> Callable[[Tensor, Tensor], Tensor]:
        on_gpu = cache.keys.device.type == "cuda"
        # A recorded graph writes where it wrote the first time; it has to know that the cache stays there.
        for tensor in (cache.keys, cache.values):
            torch._dynamo.mark_static_address(tensor)

        def step(ids: Tensor, positions: Tensor) -> Tensor:
            return self._model(ids, cache, positions)

        mode = "reduce-overhead" if on_gpu else "default"
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(
            step, fullgraph=True, dynamic=False, mode=mode
        )
        return compiled
