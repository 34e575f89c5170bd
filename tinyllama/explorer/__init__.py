"""Watch a Llama compute: the code that runs beside its values, attention, the residual stream, decoding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
