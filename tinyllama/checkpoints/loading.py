"""A model's name -> the model and its tokenizer."""

from __future__ import annotations

import torch

from tinyllama.checkpoints.hub import resolve
from tinyllama.checkpoints.load import load_model
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.text.tokenizer import Tokenizer


def load(
    name: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    attention: str = "sdpa",
    weights: str = "exact",
) -> tuple[Llama, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        name: a name on the Hub, a folder, "smollm2" (the embedded model), or None for TinyLlama-1.1B-Chat.
        device: see `load_model`.
        dtype: see `load_model`.
        attention: see `load_model`.
        weights: see `load_model`.

    Raises:
        InputError: the model cannot be had or used; the message says why and what to do.
    """
    folder = resolve(name)
    tokenizer = Tokenizer.from_folder(folder)
    vocab_size = LlamaConfig.from_folder(folder).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}; "
            "put the model's own tokenizer there"
        )
    model = load_model(folder, device=device, dtype=dtype, attention=attention, weights=weights)
    return model, tokenizer
