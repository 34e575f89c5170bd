"""config.json as transformers 4 and 5 and the model hubs write it, and every way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.shapes import LLAMA3_SCALING, ROPE_SCALINGS, TINY, tiny_model
from tinyllama.checkpoints.config_file import config_from_dict, read_config
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.rope_scaling import SCALINGS, YarnScaling

# As the repositories on the Hub have them.
TINYLLAMA_CHAT = """
    {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp":
    1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings":
    false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": true,
    "vocab_size": 32000}
"""
LLAMA_31_8B = """
    {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp":
    1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256}
"""
SMOLLM2_135M = """
    {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
    "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
    "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}
"""


def folder_with(tmp_path: Path, **files: Any) -> Path:
    """A folder with `name.json` for each argument."""
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def refusal(values: dict[str, Any]) -> str:
    """The message that such a config is refused with; one line."""
    with pytest.raises(InputError) as caught:
        config_from_dict(values, where="here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    assert "\n" not in message
    assert len(message) < 300
    return message


# --- what is read ----------------------------------------------------------------------------------------


def assert_same(ours: LlamaConfig, theirs: transformers.LlamaConfig) -> None:
    """Every field has the value that transformers gives it."""
    for field in dataclasses.fields(LlamaConfig):
        if not field.name.startswith("rope_"):
            # transformers' Llama has no sliding window.
            assert getattr(ours, field.name) == getattr(theirs, field.name, None), field.name
    rope = dict(theirs.rope_parameters)
    assert ours.rope_theta == rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    assert ours.rope_scaling == (SCALINGS[kind](**rope) if kind != "default" else None)


@pytest.mark.parametrize(
    ("published", "parameters"),
    [(TINYLLAMA_CHAT, 1_100_048_384), (LLAMA_31_8B, 8_030_261_248), (SMOLLM2_135M, 134_515_008)],
)
def test_published_configs_mean_what_transformers_reads(published: str, parameters: int):
    values = json.loads(published)
    config = config_from_dict(values)
    assert_same(config, transformers.LlamaConfig(**values))
    assert sum(config.parameters.values()) == parameters


def test_the_defaults_are_tinyllama_s():
    assert config_from_dict(json.loads(TINYLLAMA_CHAT)) == LlamaConfig()


ALL_SCALINGS = [{"rope_type": "default"}, *ROPE_SCALINGS.values()]


@pytest.mark.parametrize("rope", ALL_SCALINGS, ids=lambda rope: rope["rope_type"])
def test_every_spelling_of_rope_means_the_same(rope: dict[str, Any]):
    oldest = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
    newer = {**TINY, "rope_parameters": {"rope_theta": 5e5, **rope}}
    config = config_from_dict(newer)
    for older in (rope, oldest):
        assert config_from_dict({**TINY, "rope_theta": 5e5, "rope_scaling": older}) == config
    assert config.rope_theta == 5e5
    kind, fields = rope["rope_type"], {name: rope[name] for name in rope if name != "rope_type"}
    assert config.rope_scaling == (SCALINGS[kind](**fields) if kind != "default" else None)
    assert config_from_dict({**newer, "rope_theta": 5e5}) == config


@pytest.mark.parametrize("rope", ALL_SCALINGS, ids=lambda rope: rope["rope_type"])
def test_what_transformers_writes_is_read(tmp_path: Path, rope: dict[str, Any]):
    theirs = transformers.LlamaConfig(
        **TINY, head_dim=16, rope_parameters={"rope_theta": 2e4, **rope}, dtype="bfloat16"
    )
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours == config_from_dict(json.loads(json.dumps(theirs.to_dict())))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("published", "context"),
    [
        # lmsys/vicuna-7b-v1.5-16k, deepseek-ai/deepseek-coder-6.7b-base, NousResearch/Yarn-Llama-2-7b-64k
        ({"max_position_embeddings": 4096, "max_sequence_length": 16384,
          "rope_scaling": {"factor": 4.0, "type": "linear"}}, 16384),
        ({"max_position_embeddings": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}}, 16384),
        ({"max_position_embeddings": 65536, "rope_scaling": {"factor": 16.0, "type": "yarn",
          "original_max_position_embeddings": 4096, "finetuned": True}}, 65536),
        ({"max_position_embeddings": 4096, "rope_scaling": {"factor": 16.0, "type": "yarn",
          "original_max_position_embeddings": 4096, "attention_factor": None}}, 65536),
        ({"max_position_embeddings": 2048, "rope_scaling": {"factor": 2, "type": "dynamic"}}, 4096),
        ({"max_position_embeddings": 2048, "max_sequence_length": 4096}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"factor": 1e300, "type": "dynamic"}}, 2**31 - 1),
        ({"max_position_embeddings": 2048, "rope_scaling": {"factor": 0.1, "type": "dynamic"}}, 2048),
    ],
)  # fmt: skip
def test_the_context_is_the_stretched_one_however_the_file_says_it(published: dict[str, Any], context: int):
    assert config_from_dict({**TINY, **published}).context == context


def test_an_original_context_that_is_not_given_is_the_file_s_own_as_in_transformers():
    rope = {"rope_type": "yarn", "factor": 4.0}
    ours = config_from_dict({**TINY, "rope_scaling": rope})
    assert isinstance(ours.rope_scaling, YarnScaling)
    theirs = transformers.LlamaConfig(**TINY, rope_parameters={**rope, "rope_theta": 1e4}).rope_parameters
    own = TINY["max_position_embeddings"]
    assert ours.rope_scaling.original_max_position_embeddings == own
    assert theirs["original_max_position_embeddings"] == own


def test_absent_fields_take_the_defaults_of_transformers():
    bare = {name: value for name, value in TINY.items() if not name.startswith(("max_", "rms_", "num_key"))}
    assert_same(config_from_dict(bare), transformers.LlamaConfig(**bare))


def test_head_dim_need_not_be_a_share_of_the_hidden_size():
    assert config_from_dict({**TINY, "hidden_size": 68, "head_dim": 32}).head_dim == 32


def test_code_keys_are_ignored():
    # The module would fail to import, were it looked for.
    code = {"auto_map": {"AutoModelForCausalLM": "evil--evil.Model"}, "custom_pipelines": {"x": "y"}}
    assert config_from_dict({**TINY, **code}) == config_from_dict(TINY)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": 7}, {}, {7}),
        ({"eos_token_id": 7}, {"eos_token_id": [3, 4]}, {3, 4}),
        ({"eos_token_id": 7}, {"eos_token_id": None}, set()),
        ({"eos_token_id": []}, None, set()),
        ({}, {"do_sample": True}, {2}),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(
    tmp_path: Path, config: dict[str, Any], generation: Any, expected: set[int]
):
    folder_with(tmp_path, config=TINY | config)
    if generation is not None:
        folder_with(tmp_path, generation_config=generation)
    assert read_config(tmp_path).eos_ids == expected


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen2"),
        ("model_type", ["llama"]),
        ("architectures", ["Qwen2ForCausalLM"]),
        ("activation", "gelu"),
        ("architectures", "LlamaForCausalLM"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("is_encoder_decoder", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field: str, value: Any):
    message = refusal({**TINY, field: value})
    assert field in message
    assert repr(value) in message


def test_unknown_fields_are_all_named():
    message = refusal({**TINY, "logit_soft_cap": 30.0, "embedding_multiplier": 12, "new\nline": 1})
    assert "'embedding_multiplier', 'logit_soft_cap', 'new\\nline'" in message


def test_missing_fields_are_all_named():
    message = refusal({"model_type": "llama", "hidden_size": 64})
    assert "vocab_size, intermediate_size, num_hidden_layers, num_attention_heads" in message


SIZES = [field.name for field in dataclasses.fields(LlamaConfig) if field.type == "int"]
NOT_POSITIVE = [True, 0, -4, "64", [64], {}, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("field", SIZES)
def test_sizes_are_positive_integers(field: str):
    for value in [*NOT_POSITIVE, 64.0, 2**31]:
        assert f"{field}: expected a positive integer" in refusal({**TINY, field: value})


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_eps_and_theta_are_positive_numbers(field: str):
    for value in [*NOT_POSITIVE, "1e-5", None, 0.0, -1e-5]:
        assert f"{field}: expected a positive finite number" in refusal({**TINY, field: value})


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
def test_ids_are_integers(field: str):
    for value in ["2", 2.0, True, {}, [[2]], [2, None]]:
        assert f"{field}: expected an integer id" in refusal({**TINY, field: value})


@pytest.mark.parametrize("value", ["false", 0, None])
def test_the_tied_flag_is_a_boolean(value: Any):
    assert "tie_word_embeddings: expected true or false" in refusal({**TINY, "tie_word_embeddings": value})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_key_value_heads": 3}, ["num_attention_heads (8)", "num_key_value_heads (3)"]),
        ({"num_key_value_heads": 16}, ["num_attention_heads (8)", "num_key_value_heads (16)"]),
        ({"head_dim": 7}, ["head_dim", "even, got 7"]),
        ({"hidden_size": 72}, ["head_dim", "even, got 9"]),
        ({"hidden_size": 68}, ["hidden_size (68)", "num_attention_heads (8)"]),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, Any], parts: list[str]):
    message = refusal({**TINY, **changes})
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "got 'longrope'"),
        ({"type": "su", "factor": 2.0}, "got 'su'"),
        ({"type": "linear"}, r"linear RoPE: expected the fields \['factor'\], got \[\]"),
        ({"type": "linear", "factor": None}, r"expected the fields \['factor'\], got \[\]"),
        ({"type": "dynamic", "factor": 0}, "rope_scaling.factor: .*got 0"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 8}, "got .*'alpha'"),
        ({"type": "yarn", "factor": 2.0, "beta_fast": 0.5}, "beta_fast must exceed beta_slow"),
        ({"type": "yarn", "factor": 2.0, "beta_fast": 1e300}, "beta_fast must .* 1e.06 at most"),
        ({"type": "yarn", "factor": 2.0, "mscale": -1}, "rope_scaling.mscale: .*got -1"),
        ({"type": "yarn", "factor": 2.0, "truncate": 1}, "rope_scaling.truncate: expected true or false"),
        ({"type": "yarn", "factor": 2.0, "beta": 1}, "and perhaps .*'beta_fast'.*got .*'beta'"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "original_max"),
        ({"rope_type": None}, "got None"),
        ({"rope_type": ["llama3"]}, r"got \['llama3'\]"),
        ({"rope_type": "default", "factor": 2.0}, r"expected the fields \[\], got \['factor'\]"),
        ({"rope_type": "llama3", "factor": 2.0}, "expected the fields .*low_freq_factor"),
        ({**LLAMA3_SCALING, "beta": 1}, "got .*'beta'"),
        ({**LLAMA3_SCALING, "factor": "8"}, "rope_scaling.factor: .*'8'"),
        ({**LLAMA3_SCALING, "low_freq_factor": 0}, "rope_scaling.low_freq_factor"),
        ({**LLAMA3_SCALING, "high_freq_factor": True}, "rope_scaling.high_freq_factor"),
        ({**LLAMA3_SCALING, "high_freq_factor": 1.0}, "high_freq_factor must exceed low_freq_factor"),
        ({**LLAMA3_SCALING, "original_max_position_embeddings": 32.0}, "original_max_position_embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("linear", "expected an object, got 'linear'"),
        ([], r"expected an object, got \[\]"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_not_implemented_is_refused(spelling: str, rope: Any, message: str):
    assert re.search(message, refusal({**TINY, spelling: rope}))


def test_spellings_of_rope_that_disagree_are_refused():
    newer = {"rope_type": "default", "rope_theta": 1e4}
    assert "rope_theta" in refusal({**TINY, "rope_theta": 5e5, "rope_parameters": newer})
    assert "disagree" in refusal({**TINY, "rope_scaling": LLAMA3_SCALING, "rope_parameters": newer})


def test_absurd_sizes_are_refused_at_once():
    started = time.perf_counter()
    for changes in (
        {"num_hidden_layers": 2**31 - 1},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**30},
        dict.fromkeys(SIZES, 2**30),
    ):
        assert "parameters, expected 1e+12 at most" in refusal({**TINY, **changes})
    assert time.perf_counter() - started < 30  # a billion layers would take hours


def test_direct_construction_is_checked_too():
    with pytest.raises(InputError, match="hidden_size"):
        LlamaConfig(hidden_size=0)
    with pytest.raises(InputError, match=r"head_dim: dynamic RoPE .* must exceed 2"):
        config_from_dict({**TINY, "head_dim": 2, "rope_scaling": ROPE_SCALINGS["dynamic"]})
    with pytest.raises(InputError, match="rope_theta: YaRN's must exceed 1"):
        config_from_dict({**TINY, "rope_theta": 1.0, "rope_scaling": ROPE_SCALINGS["yarn"]})
    with pytest.raises(InputError, match="expected a RopeScaling"):
        LlamaConfig(rope_scaling=LLAMA3_SCALING)


# --- the folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["absent", "with a \0"])
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, folder: str):
    with pytest.raises(InputError, match="no such folder"):
        read_config(tmp_path / folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_malformed_file_is_refused(tmp_path: Path, name: str):
    folder_with(tmp_path, config=TINY)
    (tmp_path / name).write_text("{")
    with pytest.raises(InputError, match=f"/{name}: not valid JSON"):
        read_config(tmp_path)


def test_a_wrong_eos_id_is_blamed_on_the_file_it_is_in(tmp_path: Path):
    folder_with(tmp_path, config=TINY, generation_config={"eos_token_id": "</s>"})
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id: .*'</s>'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        {"rope_theta": 2**64 + 1},
        {"rms_norm_eps": 2**64 + 1},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING, "factor": 2**64 + 1}},
    ],
)
def test_a_number_may_be_an_integer_that_pytorch_does_not_have(field: dict[str, Any], no_grad):
    assert tiny_model(**field)(torch.tensor([[1, 2, 3]])).isfinite().all()
