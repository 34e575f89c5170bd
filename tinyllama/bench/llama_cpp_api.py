"""llama-cpp-python as the benchmark calls it; importing this takes no torch, so that loads can be timed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError

HOW_TO_INSTALL = 'pip install "tinyllama[bench]"'


def require_llama_cpp() -> None:
    """Raise InputError, with the command that installs it, where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError(f"not installed: {HOW_TO_INSTALL}")


def gguf_path(folder: Path, name: str) -> Path:
    """Where the file for one of llama.cpp's subjects lies, beside the weights that it is made from."""
    return folder / f"{name}.gguf"


def open_llama_cpp(path: Path, context: int, threads: int, logits_all: bool = False) -> Any:
    """A GGUF file in llama.cpp, on the CPU, with the package's defaults."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=logits_all,
        verbose=False,
    )


def last_logits(model: Any) -> Any:
    """Those of the last token, (V,), as NumPy sees llama.cpp's own memory."""
    import numpy as np

    return np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
