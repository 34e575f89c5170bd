"""LlamaConfig: the numbers that define a Llama, validated."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from tinyllama.errors import InputError

# Absurd sizes are refused before anything is computed from them: the largest Llama has 4e11 parameters and
# 16,384 channels.
MAX_INTEGER = 2**31 - 1
MAX_PARAMETERS = 2**40


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low RoPE frequencies (`rope_type: llama3`); see `rope.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """Refuse values that cannot be computed with."""
        _check_types(self, "rope_scaling.")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError("rope_scaling: high_freq_factor must exceed low_freq_factor; correct the file")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, under config.json's own names; the defaults are TinyLlama-1.1B's.

    Letters used for shapes everywhere: B batch, T queries (new tokens), S keys (cached and new),
    H query heads, K KV heads, G = H/K, D head_dim, C hidden size, F MLP size, L layers, V vocabulary.
    """

    vocab_size: int = 32000  # V
    hidden_size: int = 2048  # C
    intermediate_size: int = 5632  # F
    num_hidden_layers: int = 22  # L
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 4  # K
    head_dim: int = 64  # D
    max_position_embeddings: int = 2048  # context length in tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot be computed with."""
        _check_types(self)
        if sum(self.parameters.values()) > MAX_PARAMETERS:
            total = sum(self.parameters.values())
            raise InputError(f"the sizes make {total:.0e} parameters, expected {MAX_PARAMETERS:.0e} at most")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise InputError(f"rope_scaling: expected a RopeScaling, got {self.rope_scaling!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}); correct the file"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim: RoPE rotates pairs, so it must be even, got {self.head_dim}")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if value is not None and not all(type(each) is int for each in ids):
                raise InputError(f"{name}: expected an integer id, got {value!r:.80}; correct the file")

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a text; Llama 3 has several."""
        ids = self.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters per part of the model, from the shape alone; a tied head counts once, as embedding."""
        C, F, D = self.hidden_size, self.intermediate_size, self.head_dim
        H, K, L = self.num_attention_heads, self.num_key_value_heads, self.num_hidden_layers
        return {
            "embedding": self.vocab_size * C,
            "attention": L * (2 * H + 2 * K) * D * C,
            "mlp": L * 3 * F * C,
            "norms": (2 * L + 1) * C,
            "head": 0 if self.tie_word_embeddings else self.vocab_size * C,
        }


def _check_types(values: LlamaConfig | RopeScaling, prefix: str = "") -> None:
    """Refuse numbers that are not positive and finite, and flags that are not booleans."""
    for field in dataclasses.fields(values):
        name, value = prefix + field.name, getattr(values, field.name)
        if field.type == "int":  # annotations are strings here, by the first import
            positive_integer(name, value)
        # Python's integers may exceed every float.
        elif field.type == "float":
            if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
                raise InputError(
                    f"{name}: expected a positive finite number, got {value!r:.80}; correct the file"
                )
            object.__setattr__(values, field.name, float(value))  # PyTorch's integers end at 2^63
        elif field.type == "bool" and not isinstance(value, bool):
            raise InputError(f"{name}: expected true or false, got {value!r}; correct the file")


def positive_integer(name: str, value: Any) -> int:
    """The value, if it is a positive integer that a size can have; raises InputError that names it."""
    # bool is a subclass of int, and `true` is no layer count.
    if type(value) is not int or not 0 < value <= MAX_INTEGER:
        raise InputError(
            f"{name}: expected a positive integer up to {MAX_INTEGER}, got {value!r:.80}; correct the file"
        )
    return value
