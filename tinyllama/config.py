"""LlamaConfig: the numbers of config.json that define a Llama, validated."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.checkpoints.files import read_json
from tinyllama.errors import InputError

# Fields of config.json with no effect on the forward pass: about the file, training or generation defaults.
IGNORED = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "auto_map",
        "chunk_size_feed_forward",
        "custom_pipelines",
        "do_sample",
        "dtype",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_new_tokens",
        "max_sequence_length",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)

# Fields with one value that is implemented. Another would change the computation, so it is refused.
FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "quantization_config": None,
}

# A bomb is refused before anything is computed from it: the largest Llama has 4e11 parameters and 16,384
# channels.
MAX_INTEGER = 2**31 - 1
MAX_PARAMETERS = 2**40


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low RoPE frequencies (`rope_type: llama3`); see `rope.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
        """Refuse a shape that cannot be computed."""
        _check(self)

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

    @classmethod
    def from_folder(cls, folder: str | Path) -> LlamaConfig:
        """Read a checkpoint folder's config.json.

        Where generation_config.json names EOS ids, those hold, as in transformers' `generate`: Llama 3's
        chat models list their end-of-turn token only there.

        Raises:
            InputError: a file is missing or malformed, or a field has a value this code does not implement.
        """
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder; give the folder of a checkpoint")
        path = Path(folder) / "config.json"
        config = cls.from_dict(read_json(path), where=str(path))
        generation = Path(folder) / "generation_config.json"
        if not os.path.lexists(generation):
            return config
        eos = read_json(generation).get("eos_token_id", config.eos_token_id)
        try:
            return dataclasses.replace(config, eos_token_id=eos)
        except InputError as error:
            raise InputError(f"{generation}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> LlamaConfig:
        """Build a config from config.json's fields, in the spelling of transformers 4 or 5.

        An absent optional field takes transformers' default. Every field is either used, known to have no
        effect, or refused by name.

        Raises:
            InputError: a field is missing, unknown, of the wrong type or unsupported.
        """
        try:
            return cls(**_fields(values))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LlamaConfig that the fields of a config.json stand for."""
    architectures = values.get("architectures")
    if architectures not in (None, [], ["LlamaForCausalLM"]):
        raise InputError(
            f"architectures: expected ['LlamaForCausalLM'], got {architectures!r}; only Llama models work"
        )
    for name, expected in FIXED.items():
        if values.get(name, expected) not in (expected, None):
            raise InputError(
                f"{name}: only {expected!r} is implemented, got {values[name]!r}; use another model"
            )

    used = {field.name for field in dataclasses.fields(LlamaConfig)}
    unknown = sorted(
        map(repr, values.keys() - used - IGNORED - FIXED.keys() - {"architectures", "rope_parameters"})
    )
    if unknown:
        raise InputError(
            f"unknown field(s) {', '.join(unknown)}; remove them if they do not change the computation"
        )
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in values]
    if missing:
        raise InputError(f"missing field(s) {', '.join(missing)}; is this the config.json of a Llama model?")

    fields = {name: values[name] for name in used & values.keys()}
    heads = _integer("num_attention_heads", values["num_attention_heads"])
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("head_dim") is None:
        fields["head_dim"], rest = divmod(_integer("hidden_size", values["hidden_size"]), heads)
        if rest:
            raise InputError(
                f"hidden_size ({values['hidden_size']}) must be a multiple of num_attention_heads ({heads}) "
                "where head_dim is not given; correct the file"
            )
    fields.setdefault("rms_norm_eps", 1e-6)
    return fields | _rope(values)


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, from transformers 5's `rope_parameters` or 4's two fields."""
    spellings = [values[name] for name in ("rope_parameters", "rope_scaling") if values.get(name) is not None]
    for rope in spellings:
        if not isinstance(rope, dict):
            raise InputError(
                f"rope_scaling or rope_parameters: expected an object, got {rope!r}; correct the file"
            )
        if rope != spellings[0]:
            raise InputError("rope_scaling and rope_parameters disagree; remove the wrong one from the file")
    rope = dict(spellings[0]) if spellings else {}
    thetas = [where["rope_theta"] for where in (values, rope) if "rope_theta" in where]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        raise InputError(f"rope_theta: got both {thetas[0]!r} and {thetas[1]!r}; remove the wrong one")
    rope.pop("rope_theta", None)
    older_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", older_kind)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor: only 1.0 is implemented; use another model")
    if kind not in ("default", "llama3"):
        raise InputError(
            f"RoPE type: only 'default' and 'llama3' are implemented, got {kind!r}; use another model"
        )
    names = {field.name for field in dataclasses.fields(RopeScaling)} if kind == "llama3" else set()
    if rope.keys() != names:
        raise InputError(
            f"{kind} RoPE: expected the fields {sorted(names)}, got {sorted(rope)}; correct the file"
        )
    theta = thetas[0] if thetas else 10000.0
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**rope) if rope else None}


def _integer(name: str, value: Any) -> int:
    # bool is a subclass of int, and `true` is no layer count.
    if type(value) is not int or not 0 < value <= MAX_INTEGER:
        raise InputError(
            f"{name}: expected a positive integer up to {MAX_INTEGER}, got {value!r:.80}; correct the file"
        )
    return value


def _positive(name: str, value: Any) -> None:
    # Python's integers may exceed every float.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name}: expected a positive finite number, got {value!r:.80}; correct the file")


def _check(config: LlamaConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ):
        _integer(name, getattr(config, name))
    total = sum(config.parameters.values())
    if total > MAX_PARAMETERS:
        raise InputError(
            f"the sizes make {total:.0e} parameters, expected {MAX_PARAMETERS:.0e} at most; correct the file"
        )
    _positive("rms_norm_eps", config.rms_norm_eps)
    _positive("rope_theta", config.rope_theta)
    if config.rope_scaling is not None:
        if not isinstance(config.rope_scaling, RopeScaling):
            raise InputError(f"rope_scaling: expected a RopeScaling, got {config.rope_scaling!r}")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive(f"rope_scaling.{name}", getattr(config.rope_scaling, name))
        _integer(
            "rope_scaling.original_max_position_embeddings",
            config.rope_scaling.original_max_position_embeddings,
        )
        if config.rope_scaling.high_freq_factor <= config.rope_scaling.low_freq_factor:
            raise InputError("rope_scaling: high_freq_factor must exceed low_freq_factor; correct the file")
    if not isinstance(config.tie_word_embeddings, bool):
        raise InputError(f"tie_word_embeddings: expected true or false, got {config.tie_word_embeddings!r}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"num_attention_heads ({config.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads}); correct the file"
        )
    if config.head_dim % 2:
        raise InputError(f"head_dim: RoPE rotates pairs, so it must be even, got {config.head_dim}")
    bos, eos = config.bos_token_id, config.eos_token_id
    for name, ids in (("bos_token_id", [bos]), ("eos_token_id", eos if isinstance(eos, list) else [eos])):
        if ids != [None] and not all(type(value) is int for value in ids):
            raise InputError(f"{name}: expected an integer id, got {ids!r:.80}; correct the file")
