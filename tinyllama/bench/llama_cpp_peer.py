"""llama.cpp as a subject of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tinyllama.bench.limits import timed
from tinyllama.bench.llama_cpp_api import last_logits, open_llama_cpp
from tinyllama.bench.measure import Figure
from tinyllama.config import LlamaConfig
from tinyllama.parity.fixture import random_ids


class LlamaCpp:
    """llama.cpp through llama-cpp-python on the CPU, with its own defaults, one text at a time."""

    def __init__(self, name: str, path: Path, weights: int, config: LlamaConfig) -> None:
        self.name, self.weights, self.config = name, weights, config
        self.model = open_llama_cpp(path, config.max_position_embeddings, torch.get_num_threads())
        self.ids = random_ids(config.max_position_embeddings, config.vocab_size)
        self.states: dict[int, Any] = {}

    def seconds(self, figure: Figure) -> float | None:
        """Of a step or a prefill; batches have no simple call."""
        if figure.kind == "batch":
            return None
        if figure.kind == "prefill":
            self.model.reset()
            return timed(lambda: self.model.eval(self.ids[: figure.size]))
        self._fill(figure.size)
        token = self.ids[0]

        def loop(count: int) -> None:
            nonlocal token
            for _ in range(count):
                self.model.eval([token])
                token = int(last_logits(self.model).argmax())

        loop(1)
        return timed(lambda: loop(figure.steps)) / figure.steps

    def _fill(self, context: int) -> None:
        """A context in the cache: computed once, then put back."""
        if context in self.states:
            self.model.load_state(self.states[context])
            return
        self.model.reset()
        self.model.eval(self.ids[:context])
        self.states[context] = self.model.save_state()

    def bytes_read(self, rows: int, context: int) -> int:
        """The file's tensors but the embedding table, and a float16 cache."""
        config = self.config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
        return self.weights + rows * context * token
