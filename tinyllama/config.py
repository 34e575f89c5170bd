"""LlamaConfig: the numbers that define a Llama, validated."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama.errors import InputError
from tinyllama.fields import check_fields, positive_integer
from tinyllama.rope_scaling import DynamicScaling, RopeScaling, YarnScaling

# Absurd sizes are refused before anything is computed from them: the largest Llama has 4e11 parameters and
# 16,384 channels.
MAX_PARAMETERS = 2**40


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
    max_position_embeddings: int = 2048  # in tokens; see `context`
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # how many keys a query sees, itself included (Mistral v0.1)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot be computed with."""
        check_fields(self)
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
        if self.sliding_window is not None:
            positive_integer("sliding_window", self.sliding_window)
        if isinstance(self.rope_scaling, DynamicScaling) and self.head_dim == 2:
            raise InputError("head_dim: dynamic RoPE leaves the first pair alone, so it must exceed 2, got 2")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise InputError(f"rope_theta: YaRN's must exceed 1, got {self.rope_theta:g}; correct the file")
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
    def context(self) -> int:
        """How many tokens a text may have."""
        scaling = self.rope_scaling
        return self.max_position_embeddings if scaling is None else scaling.context(self)

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
