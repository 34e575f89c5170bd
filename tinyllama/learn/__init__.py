"""Build your own Llama, function by function, with a judge that names the mistake.

`check(rope=my_rotate)` in a notebook, `python scripts/learn.py` in a terminal.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
