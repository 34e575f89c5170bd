"""config.json as transformers 4 and 5 and the model hubs write it, and every way in which it can be wrong."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.shapes import LLAMA3_SCALING, TINY
from tinyllama.checkpoints.config_file import config_from_dict, read_config
from tinyllama.checkpoints.files import MAX_TEXT_BYTES, read_json
from tinyllama.config import LlamaConfig, RopeScaling
from tinyllama.errors import InputError

# As the repositories on the Hub have them.
TINYLLAMA_CHAT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2_7B: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
SCALING = {name: value for name, value in LLAMA3_SCALING.items() if name != "rope_type"}


def folder_with(tmp_path: Path, **files: Any) -> Path:
    """A folder with `name.json` for each argument: text as it is, anything else as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


def refusal(values: dict[str, Any]) -> str:
    """The message that such a config is refused with; one line."""
    with pytest.raises(InputError) as caught:
        config_from_dict(values, where="here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    assert "\n" not in message
    return message


def test_tinyllama_is_the_default():
    assert config_from_dict(TINYLLAMA_CHAT) == LlamaConfig()
    assert sum(LlamaConfig().parameters.values()) == 1_100_048_384


def test_llama_2_has_a_key_head_for_every_query_head_and_the_default_theta():
    config = config_from_dict(LLAMA_2_7B)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)
    assert sum(config.parameters.values()) == 6_738_415_616


def test_llama_31_has_scaled_rope_and_several_ends():
    config = config_from_dict(LLAMA_31_8B)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 500000.0
    assert config.eos_ids == {128001, 128008, 128009}
    assert sum(config.parameters.values()) == 8_030_261_248


def test_smollm2_ties_its_head():
    config = config_from_dict(SMOLLM2_135M)
    assert config.tie_word_embeddings
    assert (config.head_dim, config.rope_theta) == (64, 100000)
    assert sum(config.parameters.values()) == 134_515_008


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_both_spellings_of_rope_mean_the_same(scaling: dict[str, Any] | None):
    kind = "llama3" if scaling else "default"
    older = {**TINY, "rope_theta": 5e5, "rope_scaling": scaling and {"rope_type": kind, **scaling}}
    oldest = {**TINY, "rope_theta": 5e5, "rope_scaling": scaling and {"type": kind, **scaling}}
    newer = {**TINY, "rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **(scaling or {})}}
    config = config_from_dict(newer)
    assert config_from_dict(older) == config_from_dict(oldest) == config
    assert config.rope_theta == 5e5
    assert config.rope_scaling == (RopeScaling(**scaling) if scaling else None)
    assert config_from_dict({**newer, "rope_theta": 5e5}) == config


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_what_transformers_writes_is_read(tmp_path: Path, scaling: dict[str, Any] | None):
    rope = {"rope_theta": 2e4, "rope_type": "llama3" if scaling else "default", **(scaling or {})}
    theirs = transformers.LlamaConfig(**TINY, head_dim=16, rope_parameters=rope, dtype="bfloat16")
    ours = config_from_dict(json.loads(json.dumps(theirs.to_dict())))
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == ours
    assert (ours.head_dim, ours.rope_theta, ours.rms_norm_eps) == (16, 2e4, 1e-5)
    assert ours.rope_scaling == (RopeScaling(**scaling) if scaling else None)


def test_absent_fields_take_the_defaults_of_transformers():
    bare = {name: value for name, value in TINY.items() if not name.startswith(("max_", "rms_", "num_key"))}
    ours, theirs = config_from_dict(bare), transformers.LlamaConfig(**bare)
    for name in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, {7}), ({}, {7}), ({"eos_token_id": [3, 4]}, {3, 4}), ({"eos_token_id": None}, set())],
)
def test_ends_come_from_the_generation_config(tmp_path: Path, generation: Any, expected: set[int]):
    folder = folder_with(tmp_path, config={**TINY, "eos_token_id": 7})
    if generation is not None:
        folder_with(folder, generation_config=generation)
    assert read_config(folder).eos_ids == expected


def test_a_generation_config_without_ends_leaves_the_default(tmp_path: Path):
    folder = folder_with(tmp_path, config=TINY, generation_config={"do_sample": True})
    assert read_config(folder).eos_ids == {2}


def test_a_wrong_end_is_blamed_on_the_file_it_is_in(tmp_path: Path):
    folder = folder_with(tmp_path, config=TINY, generation_config={"eos_token_id": "</s>"})
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id: .*'</s>'"):
        read_config(folder)


@pytest.mark.parametrize("end", [[], None])
def test_no_end(end: Any):
    assert config_from_dict({**TINY, "eos_token_id": end}).eos_ids == frozenset()


def test_code_keys_are_ignored(tmp_path: Path):
    # The module would fail to import, were it looked for.
    code = {"auto_map": {"AutoModelForCausalLM": "evil--evil.Model"}, "custom_pipelines": {"x": "y"}}
    assert config_from_dict({**TINY, **code}) == config_from_dict(TINY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("model_type", ["llama"]),
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", 5),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "gptq"}),
        ("is_encoder_decoder", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field: str, value: Any):
    message = refusal({**TINY, field: value})
    assert field in message
    assert repr(value) in message


def test_unknown_fields_are_refused_by_name_all_at_once():
    message = refusal({**TINY, "logit_soft_cap": 30.0, "embedding_multiplier": 12, "new\nline": 1})
    assert "'embedding_multiplier', 'logit_soft_cap', 'new\\nline'" in message


def test_missing_fields_are_listed():
    message = refusal({"model_type": "llama", "hidden_size": 64})
    assert "vocab_size, intermediate_size, num_hidden_layers, num_attention_heads" in message


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize(
    "value", [0, -4, True, 64.0, "64", [64], {}, float("nan"), float("inf"), 2**31, 10**400]
)
def test_sizes_are_positive_integers(field: str, value: Any):
    message = refusal({**TINY, field: value})
    assert f"{field}: expected a positive integer" in message
    assert len(message) < 250


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "value", ["1e-5", None, True, 0, 0.0, -1e-5, [1.0], float("nan"), float("inf"), 10**400]
)
def test_eps_and_theta_are_positive_numbers(field: str, value: Any):
    assert f"{field}: expected a positive finite number" in refusal({**TINY, field: value})


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["2", 2.0, True, {}, [[2]], [2, None]])
def test_ids_are_integers(field: str, value: Any):
    assert f"{field}: expected an integer id" in refusal({**TINY, field: value})


@pytest.mark.parametrize("value", ["false", 0, None])
def test_the_tied_flag_is_a_boolean(value: Any):
    assert "tie_word_embeddings: expected true or false" in refusal({**TINY, "tie_word_embeddings": value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be a multiple of num_key_value_heads"),
        ({"num_key_value_heads": 16}, r"num_attention_heads \(8\) must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim: .* must be even, got 7"),
        ({"hidden_size": 72}, "head_dim: .* must be even, got 9"),
        ({"hidden_size": 68}, r"hidden_size \(68\) must be a multiple of num_attention_heads \(8\)"),
    ],
)
def test_heads_that_do_not_fit(changes: dict[str, Any], message: str):
    assert re.search(message, refusal({**TINY, **changes}))


def test_head_dim_need_not_be_a_share_of_the_hidden_size():
    assert config_from_dict({**TINY, "hidden_size": 68, "head_dim": 32}).head_dim == 32


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "got 'linear'"),
        ({"type": "dynamic", "factor": 2.0}, "got 'dynamic'"),
        ({"rope_type": "yarn", "factor": 2.0}, "got 'yarn'"),
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
def test_rope_that_is_not_implemented(spelling: str, rope: Any, message: str):
    assert re.search(message, refusal({**TINY, spelling: rope}))


def test_spellings_that_disagree():
    newer = {"rope_type": "default", "rope_theta": 1e4}
    assert "rope_theta" in refusal({**TINY, "rope_theta": 5e5, "rope_parameters": newer})
    assert "disagree" in refusal({**TINY, "rope_scaling": LLAMA3_SCALING, "rope_parameters": newer})


def test_a_dimension_bomb_is_refused_at_once():
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
    with pytest.raises(InputError, match="expected a RopeScaling"):
        LlamaConfig(rope_scaling=LLAMA3_SCALING)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "5", '{"vocab_size": 1', "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"],
)
def test_malformed_json(tmp_path: Path, content: str):
    with pytest.raises(
        InputError, match=r"config\.json: (not valid JSON|the file is empty|expected a JSON object)"
    ) as e:
        read_config(folder_with(tmp_path, config=content))
    assert "\n" not in str(e.value)


def test_json_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)


def test_json_that_is_huge(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(InputError, match="expected at most"):
        read_config(tmp_path)


def test_no_folder_no_file_no_regular_file(tmp_path: Path):
    absent = tmp_path / "absent"
    with pytest.raises(InputError, match=f"{re.escape(str(absent))}: no such folder"):
        read_config(absent)
    with pytest.raises(InputError, match="no such folder"):
        read_config("with a \0")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json: expected a regular file"):
        read_config(tmp_path)


def test_a_fifo_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="expected a regular file"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    folder_with(tmp_path, config=TINY)
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(InputError, match=r"generation_config\.json: expected a regular file"):
        read_config(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    folder_with(tmp_path, config=TINY)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(Permission denied\)"):
        read_json(tmp_path / "config.json")
