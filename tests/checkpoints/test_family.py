"""Models that are a Llama under another name: the same bits as transformers' own class for them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.shapes import some_ids
from tinyllama.checkpoints.config_file import read_config
from tinyllama.checkpoints.load import load_model
from tinyllama.errors import InputError
from tinyllama.generation import generate
from tinyllama.kernels import KERNELS
from tinyllama.lab.variants import window

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
def mistral(tmp_path: Path, request: pytest.FixtureRequest) -> MistralForCausalLM:
    """Mistral 7B in small, v0.3 or with a window as in v0.1, saved to the test's folder."""
    torch.manual_seed(0)
    window = getattr(request, "param", None)
    config = MistralConfig(**SIZES, sliding_window=window, attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of the folder's config.json; ... removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("mistral", [None, 16, 1, 40, 4096], indirect=True)
def test_a_mistral_is_a_llama_with_or_without_a_window(mistral, tmp_path: Path, no_grad):
    ours = load_model(tmp_path, device="cpu", dtype="float32", attention="eager")
    ids = some_ids(2, 40)
    assert torch.equal(ours(ids), mistral(ids).logits)
    ours.double()
    whole = ours(ids)
    for kernel in KERNELS.values():
        ours.set_attention(kernel)
        close(ours(ids), whole)
        for sizes in ([30, 10], [12, 20, *[1] * 8]):
            cache = ours.new_cache(2, 40)
            close(torch.cat([ours(part, cache) for part in ids.split(sizes, dim=1)], dim=1), whole)
        positions = torch.arange(-5, 35).clamp(min=-1).expand(2, -1)  # five of padding, then the text
        padded = ours(torch.cat([ids[:, :5], ids[:, :35]], dim=1), ours.new_cache(2, 40), positions)
        close(padded[:, 5:], whole[:, :35])


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of float64."""
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mistral", [16], indirect=True)
def test_a_window_holds_for_the_lab_s_kernels_and_for_generating(mistral, tmp_path: Path, no_grad):
    ours = load_model(tmp_path, device="cpu", dtype="float32")
    ids = some_ids(1, 40)
    wider = partial(window, size=30)  # the narrower of the two counts
    ours.set_attention(wider)
    with_kernel = ours.double()(ids)
    ours.set_attention(KERNELS["sdpa"])
    close(with_kernel, ours(ids))
    theirs = mistral.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(ours, [ids[0].tolist()], max_new_tokens=30, eos_ids=[])[0] == theirs[0, 40:].tolist()


def test_fields_that_a_mistral_s_file_leaves_out_are_transformers_defaults(mistral, tmp_path: Path):
    names = ("sliding_window", "num_key_value_heads", "max_position_embeddings")
    edit_config(tmp_path, **dict.fromkeys(names, ...))
    ours, theirs = read_config(tmp_path), MistralConfig.from_pretrained(tmp_path)
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window: expected a positive integer"),
        ({"sliding_window": "4096"}, "sliding_window: expected a positive integer"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": 4096},
         "sliding_window: a Llama has none"),
        ({"model_type": "qwen2"}, "got 'qwen2', which needs biases on q_proj, k_proj and v_proj"),
        ({"model_type": "qwen3"}, "got 'qwen3', which needs a norm of each head's q and k"),
        ({"model_type": "gpt2"}, "got 'gpt2'; use another model"),
        ({"model_type": ["qwen2"]}, r"got \['qwen2'\]; use"),
    ],
)  # fmt: skip
def test_a_window_that_is_none_and_relatives_are_refused_by_name(mistral, tmp_path: Path, changes, message):
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, device="cpu", dtype="float32")


def test_falcon3_s_name_for_the_mlp_changes_nothing(mistral, tmp_path: Path, no_grad):
    before = load_model(tmp_path, device="cpu", dtype="float32")(some_ids(1, 5))
    edit_config(tmp_path, activation="swiglu")
    assert torch.equal(load_model(tmp_path, device="cpu", dtype="float32")(some_ids(1, 5)), before)
