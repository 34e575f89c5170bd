"""The Llama forward pass, written by hand: text -> ids -> logits -> next id -> text.

```python
import tinyllama

model, tokenizer = tinyllama.load("smollm2", device="cpu", dtype="float32", attention="eager")
ids = tokenizer.encode("The capital of France is")
(new_ids,) = tinyllama.generate(model, [ids], max_new_tokens=30)
print(tokenizer.decode(ids + new_ids))
```
"""

import lazy_loader

# The names are listed in __init__.pyi, and imported on first use: `--help` need not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
