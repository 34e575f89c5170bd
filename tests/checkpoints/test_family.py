"""Models that are a Llama under another name: the same bits as transformers' own class for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.shapes import some_ids
from tinyllama.checkpoints.load import load_model
from tinyllama.errors import InputError

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.fixture
def mistral(tmp_path: Path) -> MistralForCausalLM:
    """Mistral 7B v0.3 in small, saved to the test's folder."""
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=None, attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    return model


def test_a_mistral_without_a_window_is_a_llama_to_the_bit(mistral, tmp_path: Path, no_grad):
    ours = load_model(tmp_path, device="cpu", dtype="float32", attention="eager")
    ids = some_ids(2, 40)
    expected = mistral(ids).logits
    assert torch.equal(ours(ids), expected)
    cache = ours.new_cache(2, 40)
    torch.testing.assert_close(ours(ids[:, :30], cache), expected[:, :30], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(ids[:, 30:], cache), expected[:, 30:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("sliding_window", 4096), ("sliding_window", ...), ("num_key_value_heads", ...)]
)
def test_a_window_or_a_default_that_is_no_llama_s_is_refused_by_name(mistral, tmp_path: Path, field, value):
    config = json.loads((tmp_path / "config.json").read_text())
    if value is ...:
        del config[field]
    else:
        config[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=field):
        load_model(tmp_path, device="cpu", dtype="float32")


def test_falcon3_s_name_for_the_mlp_changes_nothing(mistral, tmp_path: Path, no_grad):
    before = load_model(tmp_path, device="cpu", dtype="float32")(some_ids(1, 5))
    config = json.loads((tmp_path / "config.json").read_text()) | {"activation": "swiglu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path, device="cpu", dtype="float32")(some_ids(1, 5)), before)
