"""A model that several processes share, as one of those that are judged: rank 0 judges, the others compute.

Rank 0 says what all ranks do next: load a checkpoint, each its part; run a text; continue prompts. In between
the others wait, while rank 0 runs transformers, the oracle and the model in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyllama.checkpoints.load import load_model
from tinyllama.generation import generate
from tinyllama.model import Llama
from tinyllama.parallel.ranks import Ranks
from tinyllama.parity.divergence import Run
from tinyllama.parity.trace import Trace, our_trace


@dataclass(frozen=True)
class Shared:
    """A checkpoint that all ranks load: the arguments of `load_model`."""

    folder: str
    device: str
    dtype: str
    weights: str
    split: str
    pipeline: int


class OnRanks:
    """What all ranks compute together.

    Args:
        ranks: this process among them.
        split: how they share matrices.
        pipeline: into how many stages of layers they are divided.
    """

    def __init__(self, ranks: Ranks, split: str = "exact", pipeline: int = 1) -> None:
        self.ranks, self.split, self.pipeline = ranks, split, pipeline
        self._loaded: Shared | None = None
        self._model: Llama | None = None

    @property
    def name(self) -> str:
        """How they share a model, in words."""
        stages = f", {self.pipeline} stages" if self.pipeline > 1 else ""
        return f"{self.ranks.size} ranks{stages}, {self.split}"

    # Rank 0 calls these

    def run(self, folder: str, device: str, dtype: str, weights: str, attention: str) -> Run:
        """The shared model of a folder, as a computation beside others."""
        shared = Shared(folder, device, dtype, weights, self.split, self.pipeline)

        def run(ids: Sequence[int], addresses: Iterable[str]) -> Trace:
            found: Trace = self._order("trace", shared, attention, list(ids), list(addresses))
            return found

        return run

    def generate(
        self, folder: str, device: str, _model: Llama, prompts: Sequence[Sequence[int]], **settings: Any
    ) -> list[list[int]]:
        """As `generate`, by the shared model of a folder in place of one in this process, in float32."""
        shared = Shared(folder, device, "float32", "exact", self.split, self.pipeline)
        rows = [list(prompt) for prompt in prompts]
        ids: list[list[int]] = self._order("generate", shared, "sdpa", rows, settings)
        return ids

    def end(self) -> None:
        """Let the others go."""
        self.ranks.share(lambda: None)

    def _order(self, what: str, shared: Shared, *about: Any) -> Any:
        return self._obey(self.ranks.share(lambda: [what, asdict(shared), *about]))

    # The others call this

    def serve(self) -> None:
        """Do what rank 0 says, until it ends."""
        while (order := self.ranks.share(lambda: None)) is not None:
            self._obey(order)

    def _obey(self, order: Any) -> Any:
        what, fields, attention, *about = order
        model = self._load(Shared(**fields))
        model.set_attention(attention)
        if what == "trace":
            return our_trace(model, *about)
        prompts, settings = about
        return generate(model, prompts, **settings)

    def _load(self, shared: Shared) -> Llama:
        if self._model is None or self._loaded != shared:
            self._model = None  # before the next one takes memory
            arguments = asdict(shared)
            wide = arguments["dtype"] == "float64"
            # As `Checkpoint.model`: float64 holds float32's weights.
            self._model = load_model(
                **arguments | {"dtype": "float32" if wide else shared.dtype}, ranks=self.ranks
            )
            if wide:
                self._model.double()
            self._loaded = shared
        return self._model
