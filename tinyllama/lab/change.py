"""An experiment: another kernel in some layers and heads of a model, for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tinyllama.attention import Kernel
from tinyllama.model import Llama


@dataclass(frozen=True)
class Change:
    """A kernel and where it goes.

    Attributes:
        name: as it is called in results.
        kernel: the kernel.
        layers: in which layers; None: in all.
        heads: for which query heads; None: for all.
    """

    name: str
    kernel: Kernel
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @contextmanager
    def applied(self, model: Llama) -> Iterator[None]:
        """The model attends by it while the block runs; afterwards as before, whatever happens.

        Raises:
            InputError: there is no such layer or head.
        """
        before = [attention.kernel for attention in model.attentions]
        model.set_attention(self.kernel, self.layers, self.heads)
        try:
            yield
        finally:
            for attention, kernel in zip(model.attentions, before, strict=True):
                attention.kernel = kernel

    def __contains__(self, layer: int) -> bool:
        """Whether a layer is changed."""
        return self.layers is None or layer in self.layers
