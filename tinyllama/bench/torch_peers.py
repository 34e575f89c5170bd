"""The two peers on PyTorch: our model in one weight mode, and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama import KVCache, generate, load_model, prefill, stream
from tinyllama.bench.peers import GRAPH, Setup, cached_bytes, random_ids
from tinyllama.checkpoints.config_file import read_config
from tinyllama.checkpoints.storage import record_steps
from tinyllama.parallel.layers import SharedEmbedding

TABLES = (nn.Embedding, SharedEmbedding)


class Ours:
    """Our model, through the functions that a user calls; the name is the weight mode, or "graph"."""

    batches = True

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup = name, setup
        self.caches: dict[tuple[int, int], KVCache] = {}

    def load(self) -> None:
        """Load the checkpoint in this mode."""
        dtype, device = self.setup.dtype, self.setup.device
        weights = "exact" if self.name == GRAPH else self.name
        self.model = load_model(self.setup.folder, device=device, dtype=dtype, weights=weights)
        if self.name == GRAPH:
            record_steps(self.model)
        self.ids = random_ids(self.setup, self.model.config)
        self.weight_bytes = weight_bytes(self.model)
        self.cached_bytes = cached_bytes(self.model.config, getattr(torch, dtype).itemsize)

    def prefill(self, length: int) -> int:
        """Compute a prompt in an empty cache."""
        logits = prefill(self.model, [self.ids[:length]], self.model.new_cache(1, length))
        return int(logits.argmax())

    def decode(self, context: int, steps: int) -> Iterator[int]:
        """Continue a cached text."""
        ids, key = self.ids[:context], (context, steps)
        if key not in self.caches:
            self.caches[key] = self.model.new_cache(1, context + steps)
            prefill(self.model, [ids], self.caches[key])
        # The last id again: its logits choose the first new one.
        self.caches[key].length = context - 1
        return stream(self.model, ids, max_new_tokens=steps, eos_ids=(), cache=self.caches[key])

    def batch(self, rows: int, steps: int) -> None:
        """Decode several texts at once."""
        generate(self.model, [[id] for id in self.ids[:rows]], max_new_tokens=steps, eos_ids=())


class Transformers:
    """transformers with sdpa and its dynamic cache in a plain loop, a little faster than its `generate`."""

    batches = True

    def __init__(self, name: str, setup: Setup) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.name, self.setup, self.package = name, setup, transformers
        self.dtype: torch.dtype = getattr(torch, name.partition("-")[2])
        self.caches: dict[int, Any] = {}

    def load(self) -> None:
        """Load the checkpoint in the dtype that the name ends with."""
        self.model = self.package.LlamaForCausalLM.from_pretrained(
            self.setup.folder, dtype=self.dtype, attn_implementation="sdpa"
        ).to(self.setup.device)
        config = read_config(self.setup.folder)
        self.ids = torch.tensor([random_ids(self.setup, config)], device=self.setup.device)
        self.weight_bytes = weight_bytes(self.model)
        self.cached_bytes = cached_bytes(config, self.dtype.itemsize)

    def prefill(self, length: int) -> int:
        """Compute a prompt in an empty cache."""
        return int(self._next(self.ids[:, :length], self._new_cache()))

    def decode(self, context: int, steps: int) -> Iterator[int]:
        """Continue a cached text."""
        if context not in self.caches:
            self.caches[context] = self._new_cache()
            self._next(self.ids[:, :context], self.caches[context])
        cache, token = self.caches[context], self.ids[:, context - 1 : context]
        cache.crop(context - 1 - cache.get_seq_length())  # a negative number says how many to remove
        for _ in range(steps):
            token = self._next(token, cache)
            yield int(token)

    def batch(self, rows: int, steps: int) -> None:
        """Decode several texts at once."""
        tokens, cache = self.ids[:, :rows].T, self._new_cache()
        for _ in range(steps):
            tokens = self._next(tokens, cache)
            tokens.tolist()  # a user reads each token when it comes

    def _new_cache(self) -> Any:
        return self.package.DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _next(self, ids: Tensor, cache: Any) -> Tensor:
        """The most likely next id of each row, (B, 1)."""
        return self.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a decode step reads: every weight once, but one row of the embedding table.

    A head that is tied to the embedding counts.
    """
    modules = [module for module in model.modules() if not isinstance(module, TABLES)]
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in own}.values())
