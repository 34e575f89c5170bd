"""The attention lab: change attention in ten lines, and see what it did.

`check_attention` tries a kernel on every clause of the contract, `python scripts/lab.py`
measures it in a model too; docs/attention-lab.md shows how.
"""

import lazy_loader

# The names are listed in __init__.pyi, and imported on first use: `--help` need not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
