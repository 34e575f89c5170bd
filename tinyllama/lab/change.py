"""An experiment: another kernel in some layers and heads of a model, applied for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from tinyllama.attention import Kernel
from tinyllama.errors import InputError
from tinyllama.model import Llama


@dataclass(frozen=True, eq=False)
class Change:
    """A kernel and where it goes.

    Attributes:
        name: its name in results.
        kernel: the kernel.
        layers: the layers that it goes to; None: all.
        heads: the query heads that it goes to; None: all.
        weights: parameters that come with it, by name, such as healed ones.
    """

    name: str
    kernel: Kernel
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: Llama) -> Iterator[None]:
        """Change the model while the block runs; afterwards it is as before, whatever happens.

        Raises:
            InputError: there is no such layer or head, or the weights belong to another model.
        """
        kernels = {attention: attention.kernel for attention in model.attentions}
        model.set_attention(self.kernel, self.layers, self.heads)
        # A kernel's own parameters too. To list them takes milliseconds, and the tools apply many changes.
        parameters = dict(model.named_parameters()) if self.weights else {}
        weights = self.weights
        if model.sharing is not None:
            parameters = {model.sharing.name(name): one for name, one in parameters.items()}
            weights = model.sharing.parts(weights)
        before: dict[str, Tensor] = {}
        try:
            for name, weight in weights.items():
                if name not in parameters or parameters[name].shape != weight.shape:
                    raise InputError(
                        f"{self.name}: expected a model with {name} of shape {list(weight.shape)}; "
                        "use the one that the weights were trained in"
                    )
                before[name] = parameters[name].data
                parameters[name].data = weight.to(before[name])
            yield
        finally:
            for name, weight in before.items():
                parameters[name].data = weight
            for attention, kernel in kernels.items():
                attention.kernel = kernel

    def __contains__(self, layer: int) -> bool:
        """Whether the kernel goes to this layer."""
        return self.layers is None or layer in self.layers
