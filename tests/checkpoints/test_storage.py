"""Models whose matrices are kept in fewer bits: what is kept, and that they compute what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.shapes import TINY, some_ids
from tinyllama.checkpoints.config_file import config_from_dict
from tinyllama.checkpoints.files import SINGLE
from tinyllama.checkpoints.load import load_model
from tinyllama.checkpoints.storage import KINDS
from tinyllama.errors import InputError
from tinyllama.fast import compiler
from tinyllama.fast.linear import FastLinear, Int8Linear, widened
from tinyllama.generation import generate
from tinyllama.hooks import capture
from tinyllama.model import Llama
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.fixture import unit_gain_
from tinyllama.parity.reference import config_fields, reference_model

FIELDS = {**TINY, "intermediate_size": 192}
FAST = [kind for kind in KINDS if kind != "exact"]
IDS = some_ids(1, 48)
pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")


def write(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """A checkpoint folder of unit-gain weights, stored in that dtype."""
    fields = {**FIELDS, **changes}
    model = unit_gain_(Llama(config_from_dict(fields)))
    tied = bool(changes.get("tie_word_embeddings"))
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": tensor.detach().to(dtype)
        for name, tensor in model.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def load(folder: Path, weights: str, dtype: str = "float32") -> Llama:
    return load_model(folder, device="cpu", dtype=dtype, weights=weights)


def plain(model: Llama) -> Llama:
    """An ordinary model of the very numbers that a fast one stands for."""
    right = Llama(replace(model.config, tie_word_embeddings=False))
    for name, parameter in right.named_parameters():
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, FastLinear):
            parameter.data = widened(layer.weight, layer.scales, slice(None), torch.float32)
        else:
            parameter.data = model.get_parameter(name).data.to(torch.float32)
    return right.eval()


def in_pieces(model: Llama, *lengths: int) -> Tensor:
    """Logits (T, V) by a cache that takes so many tokens at a time."""
    cache = model.new_cache(1, sum(lengths))
    return torch.cat([model(part, cache) for part in IDS.split(lengths, dim=1)], dim=1)[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_passes_the_criteria_of_its_activations(kind: str, dtype: str, tied: bool, tmp_path: Path):
    # Against the truth of the numbers that it holds: whole, by single tokens, and a bit of both.
    model = load(write(tmp_path, tie_word_embeddings=tied), kind, dtype)
    right = plain(model)
    truth = oracle_logits(config_fields(right.config), right.state_dict(), IDS[0].tolist())
    reference = right.to(model.dtype)
    theirs = [reference_model(reference, name)(IDS).logits[0] for name in ("eager", "sdpa")]
    references = [difference(logits, truth) for logits in theirs]
    for logits in (model(IDS)[0], in_pieces(model, *[1] * 48), in_pieces(model, 33, 1, 8, 2, 4)):
        assert logits.dtype == model.dtype
        verdict = judge(difference(logits, truth), references, model.dtype)
        assert verdict.passed, verdict.failures


def test_stored_keeps_the_file_s_pages_and_never_more_bits_than_the_activations(tmp_path: Path):
    wanted = {
        (torch.bfloat16, "float32"): torch.bfloat16,
        (torch.float16, "float32"): torch.float16,
        (torch.float32, "float32"): torch.float32,
        (torch.float32, "bfloat16"): torch.bfloat16,
        (torch.float64, "float32"): torch.float32,
    }
    for i, ((stored, dtype), kept) in enumerate(wanted.items()):
        model = load(write(tmp_path / str(i), stored), "stored", dtype)
        layer = model.get_submodule("layers.2.mlp.down_proj")
        assert isinstance(layer, FastLinear)
        assert layer.weight.dtype == model.embed_tokens.weight.dtype == kept
        assert model.dtype == model.norm.weight.dtype == getattr(torch, dtype)
        assert model.new_cache(1, 4).keys.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", FAST)
def test_every_matrix_is_kept_and_nothing_can_be_trained(kind: str, tmp_path: Path):
    model = load(write(tmp_path), kind)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear | FastLinear)]
    assert len(layers) == 7 * 4 + 1
    assert all(type(layer) is (Int8Linear if kind == "int8" else FastLinear) for layer in layers)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert f"weights={str(layers[0].weight.dtype).removeprefix('torch.')}" in str(model)


def test_a_tied_head_is_one_tensor_unless_it_is_rounded(tmp_path: Path):
    folder = write(tmp_path, tie_word_embeddings=True)
    for kind in ("stored", "bfloat16", "float32"):
        model = load(folder, kind)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert model.num_parameters() == load(folder, "exact").num_parameters()
    rounded = load(folder, "int8")
    assert rounded.lm_head.weight.dtype == torch.int8
    assert rounded.embed_tokens.weight.dtype == torch.bfloat16


def test_a_tied_flag_with_another_head_is_refused_in_every_kind(tmp_path: Path):
    folder = write(tmp_path)
    (folder / "config.json").write_text(json.dumps({**FIELDS, "tie_word_embeddings": True}))
    for kind in KINDS:
        with pytest.raises(InputError, match="ties lm_head"):
            load(folder, kind)


@pytest.mark.parametrize("kind", ["stored", "float32"])
def test_greedy_ids_are_those_of_exact_weights(kind: str, tmp_path: Path):
    folder, prompts = write(tmp_path), [IDS[0, :n].tolist() for n in (3, 20, 40)]
    right = generate(load(folder, "exact"), prompts, max_new_tokens=30, eos_ids=())
    model = load(folder, kind)
    assert generate(model, prompts, max_new_tokens=30, eos_ids=()) == right
    assert [generate(model, [one], max_new_tokens=30, eos_ids=())[0] for one in prompts] == right


def test_values_can_be_captured_and_are_those_of_exact_weights(tmp_path: Path):
    folder = write(tmp_path)
    exact, fast = load(folder, "exact"), load(folder, "stored")
    with capture(exact, "layers.*.mlp.gate_proj") as right:
        exact(IDS)
    with capture(fast, "layers.*.mlp.gate_proj") as found:
        fast(IDS)
    assert found.keys() == right.keys()
    for address, value in found.items():
        torch.testing.assert_close(value, right[address], atol=1e-5, rtol=1e-5)


def test_stored_is_exact_where_speed_cannot_be_had(tmp_path: Path, monkeypatch):
    folder = write(tmp_path)
    assert type(load(folder, "stored", "float64").lm_head) is type(load(folder, "exact").lm_head)
    monkeypatch.setattr(compiler, "COMPILERS", ())
    model = load(folder, "stored")
    assert torch.equal(model(IDS), load(folder, "exact")(IDS))
    assert isinstance(load(folder, "int8").lm_head, Int8Linear)  # that is about memory, too


def test_what_cannot_be_kept_is_refused(tmp_path: Path):
    folder = write(tmp_path / "odd", intermediate_size=176)
    with pytest.raises(InputError, match="int8 needs rows that are a multiple of 64, got 176"):
        load(folder, "int8")
    with pytest.raises(InputError, match=r"weights: expected one of exact, stored, .*, got 'int4'"):
        load(folder, "int4")
    load(folder, "stored")  # such a matrix goes through PyTorch
