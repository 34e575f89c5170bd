"""Random weights that hide no bug, because every operation changes the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllama.checkpoints.config_file import config_from_dict
from tinyllama.model import Llama

# Four layers, eight heads in two groups.
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LENGTH = 64


def unit_gain_(model: Llama, seed: int = 0) -> Llama:
    """Fill a model with random weights, in place.

    Matrices have unit gain (std 1/sqrt(fan_in)), embeddings std 0.003, norm weights are from U(0.1, 2.1).
    With the usual std of 0.02 attention and norms change little: a model without RoPE passed at 1e-2.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if "norm" in name:
            return torch.empty(shape).uniform_(0.1, 2.1, generator=generator)
        std = 0.003 if name.startswith("embed") else shape[1] ** -0.5
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape))
    return model


def fixture(seed: int = 0, **changes: Any) -> Llama:
    """A tiny float32 model with unit-gain weights; `changes` are fields of config.json."""
    return unit_gain_(Llama(config_from_dict({**TINY, **changes})), seed).eval()


def random_ids(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Random ids, as a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
