"""Is it right? An independent float64 oracle, and judges that measure against it.

`compare` judges the logits of any two callables, `bisect` names the first operation that diverges, and
`python scripts/parity.py` does both for this project's own model; docs/different-logits.md shows how.
"""

import lazy_loader

# The names are listed in __init__.pyi, and imported on first use: `--help` need not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
