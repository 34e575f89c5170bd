"""A decode step recorded as a CUDA graph: on a GPU a step is about a thousand small kernels, and starting
them one by one from Python takes longer than running them.

The kernels are those that the model's own code starts, so this changes no bit. The model has what a
recording needs: shapes that never change (the whole cache, behind a mask), positions as a tensor, nothing
that waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllama.cache import KVCache
from tinyllama.errors import InputError
from tinyllama.model import Llama, Step


class RecordedStep:
    """`model(ids, cache, positions)` for one new token in each row, recorded once and then replayed.

    A replay starts kernels and runs no Python: hooks and prints see the recording alone. So each generation
    records anew, with the model as it then is.
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._cache: KVCache | None = None

    def forget(self) -> None:
        """Record at the next step."""
        self._cache = None

    def __call__(self, ids: Tensor, cache: KVCache, positions: Tensor) -> Tensor:
        """Ids and positions, each (B, 1) -> logits (B, 1, V), which the next call overwrites.

        Raises:
            InputError: the step cannot be recorded.
        """
        if cache is not self._cache:
            self._record(ids, cache, positions)
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._logits

    def _record(self, ids: Tensor, cache: KVCache, positions: Tensor) -> None:
        self._ids, self._positions = ids.clone(), positions.clone()  # a replay reads where the recording read
        # Libraries set themselves up when they are first used, which cannot be recorded: so once without.
        self._model(self._ids, cache, self._positions)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(ids.device), torch.cuda.graph(self._graph):
                self._logits = self._model(self._ids, cache, self._positions)
        except RuntimeError as error:
            raise InputError(
                "graph: the decode step cannot be recorded, because something in it waits for the GPU "
                f"(.item(), a branch on values, a copy from the CPU?); leave graph out: {error}"
            ) from error
        self._cache = cache


def record_steps(model: Llama) -> None:
    """Let generations take their decode steps from a recording, from now on."""
    step = RecordedStep(model)

    def supervise(steps: Iterator[Step]) -> Iterator[Step]:
        step.forget()
        yield from steps

    model.step, model.supervise = step, supervise  # type: ignore[method-assign]
