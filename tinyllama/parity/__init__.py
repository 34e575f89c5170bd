"""Whether a model is right: an independent float64 oracle, and comparisons with it.

`compare` judges the logits of any two callables, `bisect` names the first operation that diverges, and
`python scripts/parity.py` does both for this project's own model; docs/different-logits.md shows how.
"""

import lazy_loader

# The names are listed in __init__.pyi and imported on first use, so that `--help` need not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
