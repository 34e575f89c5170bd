"""Who can take part: our modes and the peers, by name. Importing this takes no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tinyllama
from tinyllama.errors import InputError

if TYPE_CHECKING:
    from tinyllama import Llama


@dataclass(frozen=True)
class Mode:
    """One of our modes: the arguments of `load_model`."""

    dtype: str
    weights: str

    def load(self, folder: Path, device: str) -> Llama:
        """The model in that mode."""
        return tinyllama.load_model(folder, device=device, dtype=self.dtype, weights=self.weights)


MODES = {
    "ours-exact": Mode("float32", "exact"),
    "ours-float32": Mode("float32", "float32"),
    "ours-mixed": Mode("float32", "stored"),
    "ours-bfloat16": Mode("bfloat16", "stored"),
    "ours-int8": Mode("float32", "int8"),
    "ours-int8-bfloat16": Mode("bfloat16", "int8"),
}
HF, COMPILED = "hf-", "hf-compiled-"
DTYPES = ("float32", "bfloat16", "float16")
GGUF_KINDS = {"llama.cpp-f16": "F16", "llama.cpp-q8": "Q8_0"}
NAMES = (*MODES, *(f"{HF}{d}" for d in DTYPES), *(f"{COMPILED}{d}" for d in DTYPES), *GGUF_KINDS)

# What weights and activations each has, for the reader of a table.
LEGEND = {
    "ours-exact": "float32, PyTorch's products",
    "ours-float32": "float32",
    "ours-mixed": "bfloat16 weights, float32 activations",
    "ours-bfloat16": "bfloat16",
    "ours-int8": "int8 weights, float32 activations",
    "ours-int8-bfloat16": "int8 weights, bfloat16 activations",
    **{f"{HF}{d}": f"transformers' forward pass in a loop, {d}" for d in DTYPES},
    **{f"{COMPILED}{d}": f"the same with a static cache under torch.compile, {d}" for d in DTYPES},
    "llama.cpp-f16": "llama-cpp-python, F16 weights",
    "llama.cpp-q8": "llama-cpp-python, Q8_0 weights",
}


def chosen(only: Sequence[str] | None, float16: bool, compiled: bool) -> tuple[list[str], dict[str, str]]:
    """The names that take part, and why others do not.

    Args:
        only: these, and those that begin with one of these; None takes all.
        float16: with the peers in float16.
        compiled: with the peers under torch.compile.

    Raises:
        InputError: one of `only` is the beginning of none.
    """
    for wanted in only or ():
        if not any(name.startswith(wanted) for name in NAMES):
            raise InputError(f"only: expected the beginning of one of {', '.join(NAMES)}; got {wanted!r}")
    off = {name for name in NAMES if name.endswith("-float16") and not float16}
    slow = {name for name in NAMES if name.startswith(COMPILED) and not compiled} - off
    if only:
        beginnings = tuple(wanted for wanted in only if wanted not in NAMES)  # a whole name stands for itself
        begun = {name for name in NAMES if beginnings and name.startswith(beginnings)} - off - slow
        return [name for name in NAMES if name in only or name in begun], {}
    skipped = dict.fromkeys(slow, "left out: compiling takes a minute; --no-compiled or --quick was given")
    return [name for name in NAMES if name not in off | slow], dict(sorted(skipped.items()))
