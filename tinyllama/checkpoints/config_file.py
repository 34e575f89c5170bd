"""config.json -> LlamaConfig, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tinyllama.checkpoints.files import read_json
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.fields import positive_integer
from tinyllama.progress import note
from tinyllama.rope_scaling import SCALINGS, RopeScaling

# Fields with no effect on the forward pass: about the file, training or generation defaults.
IGNORED = """
    _attn_implementation_autoset _name_or_path attention_kernel attention_source auto_map
    chunk_size_feed_forward custom_pipelines do_sample dtype id2label initializer_range is_llama_config
    label2id max_length max_new_tokens max_sequence_length name_or_path output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type repetition_penalty return_dict
    temperature tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_cache
"""

# Fields with one value that is implemented. Another would change the computation, so it is refused.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "activation": "swiglu",  # Falcon3's name for the same MLP
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

# model_type -> the architecture, and transformers' defaults for absent fields where they are not a Llama's.
FAMILY: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": (
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
}

# Relatives that are refused -> what they would need.
RELATIVES = {
    "qwen2": "biases on q_proj, k_proj and v_proj",
    "qwen3": "a norm of each head's q and k before RoPE",
    "gemma": "norm weights as 1 + w, scaled embeddings and GELU",
    "phi3": "q, k and v, and gate and up, in one matrix each",
    "mixtral": "a choice among several MLPs for each token",
}


def read_config(folder: str | Path) -> LlamaConfig:
    """Read a checkpoint folder's config.json.

    EOS ids in generation_config.json come before those in config.json, as in transformers' `generate`: Llama
    3's chat models list their end-of-turn token only there.

    Raises:
        InputError: a file is missing or malformed, or a field has a value this code does not implement.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; give the folder of a checkpoint")
    path = Path(folder) / "config.json"
    config = config_from_dict(read_json(path), where=str(path))
    generation = Path(folder) / "generation_config.json"
    if not os.path.lexists(generation):
        return config
    eos = read_json(generation).get("eos_token_id", config.eos_token_id)
    try:
        return dataclasses.replace(config, eos_token_id=eos)
    except InputError as error:
        raise InputError(f"{generation}: {error}") from error


def check_kernel(folder: Path, given: str, source: str | None) -> None:
    """Raise InputError if the weights were trained with another attention than the one of that name.

    A kernel of a user's file is known by its name; one line on stderr says if its code, of which `source`
    is a digest, has changed since.
    """
    values = read_json(folder / "config.json")
    trained = values.get("attention_kernel")
    if trained == given and values.get("attention_source") not in (None, source):
        note(f"{folder}: the code of {given} is not what it was when these weights were trained with it")
    if trained is not None and trained != given:
        raise InputError(
            f"{folder}: its weights were trained with attention {trained!r:.80}, and attention is {given}; "
            "give that kernel as `attention`, or --attention"
        )


def config_from_dict(values: dict[str, Any], where: str = "config") -> LlamaConfig:
    """Build a config from config.json's fields.

    An absent optional field takes transformers' default. Every field is either used, known to have no
    effect, or refused by name.

    Raises:
        InputError: a field is missing, unknown, of the wrong type or unsupported.
    """
    try:
        return LlamaConfig(**_arguments(values))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json as the arguments of LlamaConfig."""
    for name, expected in FIXED.items():
        if values.get(name, expected) not in (expected, None):
            raise InputError(
                f"{name}: only {expected!r} is implemented, got {values[name]!r}; use another model"
            )

    kind = values.get("model_type") or "llama"
    if not isinstance(kind, str) or kind not in FAMILY:
        needs = f", which needs {RELATIVES[kind]}" if isinstance(kind, str) and kind in RELATIVES else ""
        raise InputError(
            f"model_type: only {' and '.join(FAMILY)} are implemented, got {kind!r:.80}{needs}; "
            "use another model"
        )
    architecture, defaults = FAMILY[kind]
    values = {**defaults, **values}
    if (named := values.get("architectures")) not in ([architecture], None):
        raise InputError(f"architectures: expected [{architecture!r}], got {named!r:.80}; use another model")
    used = {field.name for field in dataclasses.fields(LlamaConfig)}
    known = {*IGNORED.split(), "architectures", "model_type", "rope_parameters"}
    unknown = sorted(map(repr, values.keys() - used - FIXED.keys() - known))
    if unknown:
        raise InputError(
            f"unknown field(s) {', '.join(unknown)}; remove them if they do not change the computation"
        )
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in values]
    if missing:
        raise InputError(f"missing field(s) {', '.join(missing)}; is this the config.json of a Llama model?")

    if kind == "llama" and values.get("sliding_window") is not None:
        raise InputError(
            "sliding_window: a Llama has none (transformers ignores it); remove it or use another model"
        )
    fields = {name: values[name] for name in used & values.keys()}
    heads = positive_integer("num_attention_heads", values["num_attention_heads"])
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("head_dim") is None:
        fields["head_dim"], rest = divmod(positive_integer("hidden_size", values["hidden_size"]), heads)
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
            raise InputError(f"rope_scaling or rope_parameters: expected an object, got {rope!r}")
        if rope != spellings[0]:
            raise InputError("rope_scaling and rope_parameters disagree; remove the wrong one from the file")
    rope = dict(spellings[0]) if spellings else {}
    thetas = [where["rope_theta"] for where in (values, rope) if "rope_theta" in where]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        raise InputError(f"rope_theta: got both {thetas[0]!r} and {thetas[1]!r}; remove the wrong one")
    rope.pop("rope_theta", None)
    older = rope.pop("type", "default")  # the name that transformers first had for `rope_type`
    kind = rope.pop("rope_type", older)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor: only 1.0 is implemented; use another model")
    scaling = None if kind == "default" and not rope else _scaling(kind, rope, values)
    fields: dict[str, Any] = {"rope_theta": thetas[0] if thetas else 10000.0, "rope_scaling": scaling}
    # Vicuna's files have the stretched context under this name, and the original one where others have it.
    longer = values.get("max_sequence_length")
    if kind == "linear" and longer is not None:
        own = values.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
        fields["max_position_embeddings"] = max(
            positive_integer("max_sequence_length", longer), positive_integer("max_position_embeddings", own)
        )
    return fields


def _scaling(kind: Any, rope: dict[str, Any], values: dict[str, Any]) -> RopeScaling:
    """The scaling of that type, from its fields in the file."""
    if not isinstance(kind, str) or kind not in ("default", *SCALINGS):
        raise InputError(
            f"RoPE type: only default, {', '.join(SCALINGS)} are implemented, got {kind!r:.80}; "
            "use another model"
        )
    given = {name: value for name, value in rope.items() if value is not None}
    given.pop("finetuned", None)  # how a YaRN came about
    possible = dataclasses.fields(SCALINGS[kind]) if kind in SCALINGS else ()
    required = {field.name for field in possible if field.default is dataclasses.MISSING}
    if "original_max_position_embeddings" in required and "max_position_embeddings" in values:
        given.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    optional = {field.name for field in possible} - required
    if not required <= given.keys() <= required | optional:
        perhaps = f" and perhaps {sorted(optional)}" if optional else ""
        raise InputError(
            f"{kind} RoPE: expected the fields {sorted(required)}{perhaps}, got {sorted(given)}; "
            "correct the file"
        )
    return SCALINGS[kind](**given)
