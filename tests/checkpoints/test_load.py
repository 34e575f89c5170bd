"""Loading: what a sound checkpoint gives, and what is checked before and while its weights are read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints.folders import (
    EMBEDDING,
    FIELDS,
    HEAD,
    Q,
    file_of,
    load,
    refusal,
    same,
    weights,
    write,
    write_shards,
)
from tests.shapes import tiny_model
from tinyllama import device
from tinyllama.attention import Attention
from tinyllama.checkpoints import load as loading
from tinyllama.checkpoints.files import SINGLE
from tinyllama.kernels import KERNELS


def test_the_weights_are_the_file_s(tmp_path: Path):
    model = load(write(tmp_path))
    assert same(model, load_file(tmp_path / SINGLE))
    assert len(model.state_dict()) == len(weights())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_changing_the_model_leaves_the_file_alone(tmp_path: Path):
    before = (write(tmp_path) / SINGLE).read_bytes()
    model = load(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not same(model, weights())
    assert (tmp_path / SINGLE).read_bytes() == before


def without_prefix(folder: Path) -> None:
    write(folder, {key.removeprefix("model."): tensor for key, tensor in weights().items()})


def with_rope_table(folder: Path) -> None:
    table = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(2)}
    write(folder, weights() | table)


def unaligned(folder: Path) -> None:
    content = (write(folder) / SINGLE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    (folder / SINGLE).write_bytes(file_of(content[8:end] + b" ", content[end:]))


def read_only(folder: Path) -> None:
    write(folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & 0o555)


@pytest.mark.parametrize("make", [write_shards, without_prefix, with_rope_table, unaligned, read_only])
def test_other_forms_of_a_folder_give_the_same_model(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / "folder")
    before = sorted((tmp_path / "folder").iterdir())
    assert same(load(tmp_path / "folder"), weights())
    assert sorted((tmp_path / "folder").iterdir()) == before
    (tmp_path / "folder").chmod(0o755)


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_embedding(tmp_path: Path, stored: bool):
    tensors = weights(tied=True)
    if stored:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    model = load(write(tmp_path, tensors, tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert same(model, tensors)


def test_a_tied_flag_with_another_head_is_refused(tmp_path: Path):
    tensors = weights(tied=True)
    tensors[HEAD] = tensors[EMBEDDING] * 2
    refusal(write(tmp_path, tensors, tie_word_embeddings=True), str(tmp_path), HEAD, "tie_word_embeddings")


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("stored", DTYPES)
def test_weights_are_converted(tmp_path: Path, stored: torch.dtype):
    tensors = weights(dtype=stored)
    write(tmp_path, tensors)
    for wanted in DTYPES:
        model = load(tmp_path, dtype=wanted)
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}
        assert same(model, {key: tensor.to(wanted) for key, tensor in tensors.items()})


def test_the_attention_is_chosen(tmp_path: Path):
    write(tmp_path)
    for name, chosen in KERNELS.items():
        attentions = [m for m in load(tmp_path, attention=name).modules() if isinstance(m, Attention)]
        assert [attention.kernel for attention in attentions] == [chosen, chosen]
    refusal(tmp_path, "attention", "'flash'", attention="flash")


# --- memory ----------------------------------------------------------------------------------------------


def resident_bytes(file: Path) -> list[int]:
    """How much of the file each of this process's maps of it has in memory."""
    areas = Path("/proc/self/smaps").read_text().split("VmFlags")
    return [
        int(re.findall(r"^Rss: +(\d+)", area, re.MULTILINE)[0]) * 1024 for area in areas if str(file) in area
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_no_second_copy_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: torch.dtype):
    fields = {**FIELDS, "hidden_size": 512, "intermediate_size": 1024}
    model = tiny_model(**fields).to(torch.bfloat16)
    file = write(tmp_path, dict(model.state_dict()), **fields) / SINGLE
    size = model.num_parameters() * 2
    mapped: list[list[int]] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
        assert total == size
        yield lambda step: mapped.append(resident_bytes(file))

    monkeypatch.setattr(loading, "byte_progress", progress)
    held = load(tmp_path, dtype=wanted)
    if wanted == torch.bfloat16:  # the pages are the weights: none is copied, none mapped twice
        assert len(mapped[-1]) == 1
        assert sum(mapped[-1]) >= 0.95 * size
    else:  # the pages go as soon as they are converted
        assert max(map(sum, mapped)) < 0.25 * size
        assert resident_bytes(file) == []
    assert held.num_parameters() == model.num_parameters()


def test_too_little_memory_is_refused_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device, "free_memory", lambda device: 1000)
    broken = torch.full((16, 16), torch.nan)  # would be refused, if it were read
    refusal(write(tmp_path, weights() | {Q: broken}), "memory", "GB")


def test_free_memory_is_plausible():
    free = device.free_memory(torch.device("cpu"))
    assert free is None or 1e7 < free < 1e14


# --- weights that do not fit the config ------------------------------------------------------------------


def test_missing_tensors_are_all_listed(tmp_path: Path):
    gone = [Q, "model.norm.weight", HEAD, EMBEDDING]
    tensors = {key: tensor for key, tensor in weights().items() if key not in gone}
    refusal(write(tmp_path, tensors), str(tmp_path), "missing", *gone)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.9.odd.weight",
        "model.layers.x",
        "surprise",
        "model.model.norm.weight",
        "new\nline",
    ],
)
def test_an_extra_tensor_is_named(tmp_path: Path, key: str):
    refusal(write(tmp_path, weights() | {key: torch.zeros(16)}), str(tmp_path), f"not known {key!r}")


@pytest.mark.parametrize("layers", [3, 1_000_000])
def test_a_layer_that_the_weights_lack_is_named(tmp_path: Path, layers: int):
    write(tmp_path, num_hidden_layers=layers)
    refusal(tmp_path, str(tmp_path), f"{layers} layers", "missing model.layers.2.input_layernorm.weight")


@pytest.mark.parametrize(
    "tensor", [torch.tensor(1.0), torch.zeros(0, 16), torch.zeros(16, 8), torch.zeros(256)]
)
def test_a_wrong_shape_is_refused(tmp_path: Path, tensor: Tensor):
    refusal(write(tmp_path, weights() | {Q: tensor}), SINGLE, Q, str(list(tensor.shape)), "[16, 16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float, wanted: str):
    broken = weights()[Q].clone()
    broken[3, 5] = value
    refusal(write(tmp_path, weights() | {Q: broken}), SINGLE, Q, "NaN or Inf", dtype=wanted)


def test_a_value_that_overflows_in_16_bits_is_refused(tmp_path: Path):
    large = weights()[Q].clone()
    large[3, 5] = 1e5
    write(tmp_path, weights() | {Q: large})
    refusal(tmp_path, SINGLE, Q, "float16", "use float32", dtype="float16")
    assert load(tmp_path, dtype="bfloat16").state_dict()[Q.removeprefix("model.")][3, 5] > 9e4


def test_a_file_cut_short_while_it_is_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def check_and_cut(*args: Any) -> None:
        os.truncate(tmp_path / SINGLE, 100)

    write(tmp_path)
    monkeypatch.setattr(loading, "check_memory", check_and_cut)
    refusal(tmp_path, SINGLE, "cannot be loaded")


# --- devices and dtypes ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_that_is_absent_is_refused(tmp_path: Path):
    refusal(write(tmp_path), "device: cuda:1", "no CUDA device", device="cuda:1")


def test_a_cuda_device_too_many_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"device: cuda:2 .* none after cuda:1"):
        device.usable_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "xla", None, 1.5])
def test_a_device_of_another_kind_is_refused(name: Any):
    with pytest.raises(ValueError, match="device: expected cpu, cuda, cuda:N or mps"):
        device.usable_device(name)


def test_an_apple_gpu_is_refused_where_there_is_none_and_has_no_float64(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refusal(write(tmp_path), "device: mps", "no Apple GPU", device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    refusal(write(tmp_path), "dtype: an Apple GPU has no float64", "float32", device="mps", dtype="float64")


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "Tensor", "", None, torch.int64])
def test_a_dtype_of_another_kind_is_refused(name: Any):
    with pytest.raises(ValueError, match="dtype: expected float32"):
        device.floating_dtype(name)
