"""transformers over the very tensors of one of our models, as a subject of the benchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllama.bench.limits import timed
from tinyllama.bench.measure import Figure
from tinyllama.bench.ours import EMBEDDING, cached_bytes, weight_bytes
from tinyllama.model import Llama
from tinyllama.parity.fixture import random_ids


class Transformers:
    """transformers' forward pass over the same tensors, with sdpa and its dynamic cache, in a plain loop.

    That is a little faster than its `generate`.
    """

    def __init__(self, name: str, model: Llama) -> None:
        from tinyllama.parity.reference import reference_model

        self.name, self.config = name, model.config
        self.dtype, self.device = model.embed_tokens.weight.dtype, model.embed_tokens.weight.device
        self.model: Any = reference_model(model, "sdpa")
        self.weights, self.cached = weight_bytes(self.model, EMBEDDING), cached_bytes(model)
        ids = random_ids(self.config.max_position_embeddings, self.config.vocab_size)
        self.ids = torch.tensor([ids], device=self.device)

    @torch.inference_mode()
    def seconds(self, figure: Figure) -> float | None:
        """Of a step or a prefill."""
        if figure.kind == "prefill":
            ids = self.ids[:, : figure.size]
            return timed(lambda: self.model(ids, use_cache=True, logits_to_keep=1), self.device)
        decode = figure.kind == "decode"
        cache = self.filled_cache(figure.size) if decode else self.new_cache()
        token = self.ids[:, :1] if decode else self.ids[:, : figure.size].T
        return self._steps(token, cache, figure.steps)

    def _steps(self, token: Tensor, cache: Any, steps: int) -> float:
        def loop(count: int) -> None:
            nonlocal token
            for _ in range(count):
                token = self.step(token, cache).argmax(-1)
                token.tolist()  # as a stream needs it

        loop(1)
        return timed(lambda: loop(steps), self.device) / steps

    def step(self, token: Tensor, cache: Any) -> Tensor:
        """Logits after one more token in each row, (B, 1, V)."""
        return self.model(token, past_key_values=cache).logits

    def new_cache(self) -> Any:
        """Of transformers' own kind, empty."""
        import transformers

        return transformers.DynamicCache(config=self.model.config)

    def filled_cache(self, context: int) -> Any:
        """With random keys and values."""
        cache = self.new_cache()
        shape = (1, self.config.num_key_value_heads, context, self.config.head_dim)
        for layer in range(self.config.num_hidden_layers):
            k, v = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(2))
            cache.update(k, v, layer)
        return cache

    def bytes_read(self, rows: int, context: int) -> int:
        """As ours: the tensors are the same."""
        return self.weights + rows * context * self.cached


class CompiledTransformers(Transformers):
    """The decode step of transformers under torch.compile, with its static cache: after one context only.

    Each other size would be compiled anew, which takes a minute.
    """

    def __init__(self, name: str, model: Llama, figure: Figure) -> None:
        super().__init__(name, model)
        self.figure = figure
        self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.seconds(figure)  # compiles, or fails here

    def seconds(self, figure: Figure) -> float | None:
        """Of a step after the one context."""
        return super().seconds(figure) if figure == self.figure else None

    def step(self, token: Tensor, cache: Any) -> Tensor:
        """Logits after one more token, (1, 1, V)."""
        return self.compiled(token, past_key_values=cache).logits

    def filled_cache(self, context: int) -> Any:
        """A static cache with room for the steps and no more, as it attends to all of it."""
        import transformers

        config, capacity = self.config, context + self.figure.steps + 1
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=capacity)
        cache.early_initialization(1, config.num_key_value_heads, config.head_dim, self.dtype, self.device)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
        return cache
