"""Our modes as subjects of the benchmark, and the bytes that a module's tensors take."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor, nn

import tinyllama
from tinyllama.bench.limits import timed
from tinyllama.bench.measure import Figure
from tinyllama.cache import KVCache
from tinyllama.generation import TokenStream
from tinyllama.model import Llama
from tinyllama.parity.fixture import random_ids

EMBEDDING = "embed_tokens"


def weight_bytes(module: nn.Module, but: str = "") -> int:
    """Bytes of the memory that holds a module's tensors, each byte once; `but` is a part that is left out.

    A tensor that is only a view of another's memory, or a name for the same one, adds nothing.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for name, part in module.named_modules()
        if not but or name.split(".")[-1] != but
        for tensor in _own_tensors(part)
    )
    total, reached = 0, 0
    for start, end in spans:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    # A fast layer may keep its packed weights as a plain attribute.
    for values in (module._parameters, module._buffers, vars(module)):
        yield from (value for value in values.values() if isinstance(value, Tensor))


class Ours:
    """Our model, through the functions that a user calls."""

    def __init__(self, name: str, model: Llama) -> None:
        self.name, self.model = name, model
        self.ids = random_ids(model.config.max_position_embeddings, model.config.vocab_size)
        self.weights = weight_bytes(model, EMBEDDING)
        self.device = model.embed_tokens.weight.device

    def seconds(self, figure: Figure) -> float | None:
        """Of a step or a prefill."""
        return getattr(self, figure.kind)(figure.size, figure.steps)

    def prefill(self, length: int, _steps: int) -> float:
        """A prompt into an empty cache, to the logits of its next token."""
        cache = self.model.new_cache(1, length)
        return timed(lambda: tinyllama.prefill(self.model, [self.ids[:length]], cache), self.device)

    def decode(self, context: int, steps: int) -> float:
        """Each of the steps of a stream after a context; what is cached is random, which costs the same."""
        tokens = self.stream(context, steps, self.filled_cache(context + steps + 1))
        return timed(lambda: deque(tokens, maxlen=0), self.device) / steps

    def stream(self, context: int, steps: int, cache: KVCache) -> TokenStream:
        """A stream after its first token, with all steps before it; `cache` holds the context."""
        tokens = tinyllama.stream(
            self.model,
            self.ids[:context],
            max_new_tokens=steps + 1,
            eos_ids=(),
            cache=cache,
            cached=context - 1,
        )
        next(tokens)
        return tokens

    def batch(self, rows: int, steps: int) -> float:
        """Each step for several texts at once, which begin with one token each."""
        prompts = [[id] for id in self.ids[:rows]]

        def action() -> None:
            tinyllama.generate(self.model, prompts, max_new_tokens=steps, eos_ids=())

        return timed(action, self.device) / steps

    def filled_cache(self, capacity: int) -> KVCache:
        """With random keys and values: zeros never written are one page, which the CPU's cache keeps."""
        cache = self.model.new_cache(1, capacity)
        cache.keys.normal_()
        cache.values.normal_()
        return cache

    def bytes_read(self, rows: int, context: int) -> int:
        """Every weight outside the embedding table, and the keys and values of each row."""
        return self.weights + rows * context * cached_bytes(self.model)


def cached_bytes(model: Llama) -> int:
    """What the KV cache keeps of one token."""
    cache = model.new_cache(1, 1)
    return (cache.keys.nbytes + cache.values.nbytes) // cache.keys.shape[3]
