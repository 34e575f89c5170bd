"""The Llama forward pass, written by hand: text -> ids -> logits -> next id -> text.

```python
import tinyllama

model, tokenizer = tinyllama.load("smollm2", device="cpu", dtype="float32", attention="eager")
ids = tokenizer.encode("The capital of France is")
(new_ids,) = tinyllama.generate(model, [ids], max_new_tokens=30)
print(tokenizer.decode(ids + new_ids))
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllama.lazy import lazily

if TYPE_CHECKING:
    from tinyllama.activations import addresses, capture, patch
    from tinyllama.attention import AttentionContext, eager, sdpa
    from tinyllama.cache import KVCache
    from tinyllama.checkpoint import load_model
    from tinyllama.config import LlamaConfig, RopeScaling
    from tinyllama.errors import InputError
    from tinyllama.generation import TextReply, TokenStream, generate, prefill, stream
    from tinyllama.hub import resolve
    from tinyllama.loading import load
    from tinyllama.model import Llama
    from tinyllama.sampler import NonFiniteLogitsError, Sampler
    from tinyllama.tokenizer import Tokenizer

__all__ = [
    "AttentionContext",
    "InputError",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "NonFiniteLogitsError",
    "RopeScaling",
    "Sampler",
    "TextReply",
    "TokenStream",
    "Tokenizer",
    "addresses",
    "capture",
    "eager",
    "generate",
    "load",
    "load_model",
    "patch",
    "prefill",
    "resolve",
    "sdpa",
    "stream",
]

_PLACES = {
    "activations": ["addresses", "capture", "patch"],
    "attention": ["AttentionContext", "eager", "sdpa"],
    "cache": ["KVCache"],
    "checkpoint": ["load_model"],
    "config": ["LlamaConfig", "RopeScaling"],
    "errors": ["InputError"],
    "generation": ["TextReply", "TokenStream", "generate", "prefill", "stream"],
    "hub": ["resolve"],
    "loading": ["load"],
    "model": ["Llama"],
    "sampler": ["NonFiniteLogitsError", "Sampler"],
    "tokenizer": ["Tokenizer"],
}

__getattr__ = lazily(__name__, _PLACES)
