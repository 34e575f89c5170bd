"""Small shapes and models that the tests share."""

from __future__ import annotations

from typing import Any

import torch

from tinyllama.checkpoints.config_file import config_from_dict
from tinyllama.config import LlamaConfig
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity.fixture import TINY, fixture

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Every type, with numbers small enough for a text of 64 tokens to pass all borders.
ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": LLAMA3_SCALING,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0},
}


def tiny_config(**changes: Any) -> LlamaConfig:
    """Four layers, eight heads in two groups."""
    return config_from_dict({**TINY, **changes})


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "eager", **changes: Any
) -> Llama:
    """A tiny model with unit-gain weights, under which every operation matters."""
    model = fixture(seed, **changes).to(dtype)
    model.set_attention(KERNELS[attention])
    return model


def some_ids(batch: int, length: int, vocab_size: int = 320, seed: int = 0) -> torch.Tensor:
    """(batch, length) random ids."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
