"""Loading: what a sound checkpoint gives, and the one line that each fault gets."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.shapes import TINY, some_ids
from tinyllama import device
from tinyllama.attention import Attention
from tinyllama.checkpoints import load as checkpoint
from tinyllama.checkpoints.files import INDEX, SINGLE
from tinyllama.checkpoints.load import load_model
from tinyllama.checkpoints.tensor_file import MAX_HEADER_BYTES, read_header
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity.fixture import unit_gain_

FIELDS = {
    **TINY,
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Edit = Callable[[dict[str, Any]], Any]


@cache
def _weights(tied: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    model = unit_gain_(Llama(LlamaConfig.from_dict({**FIELDS, "tie_word_embeddings": tied})))
    return {
        name if name == HEAD else f"model.{name}": tensor.detach().to(dtype)
        for name, tensor in model.state_dict().items()
        if not (tied and name == HEAD)
    }


def weights(tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A tiny checkpoint's tensors; a tied one has no head."""
    return dict(_weights(tied, dtype))


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A checkpoint folder of these tensors, with these fields of config.json changed."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    save_file(weights() if tensors is None else tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """The same in two shards, the tensors dealt out in turn."""
    write(folder)
    (folder / SINGLE).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = weights() if tensors is None else tensors
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key, shard in weight_map.items() if shard == name}, folder / name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert isinstance(weight_map, dict)
    return weight_map


def with_header(folder: Path, header: bytes, data: bytes = b"") -> Path:
    """A checkpoint folder whose weights file has this header before this data."""
    write(folder)
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def edited(folder: Path, edit: Edit, data: Callable[[bytes], bytes] = bytes) -> Path:
    """A checkpoint folder whose header was changed as Python values, and its data as bytes."""
    file = write(folder) / SINGLE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    return with_header(folder, json.dumps(header).encode(), data(content[8 + length :]))


def load(folder: Path, device: str = "cpu", dtype: str | torch.dtype = "float32", **options: Any) -> Llama:
    return load_model(folder, device=device, dtype=dtype, **options)


def refusal(folder: Path, *parts: str, **options: Any) -> None:
    """Loading fails with an InputError: one line, with all these parts."""
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def same(model: Llama, tensors: dict[str, Tensor]) -> bool:
    """Whether the model holds exactly these tensors."""
    state = model.state_dict()
    return all(torch.equal(state[key.removeprefix("model.")], tensor) for key, tensor in tensors.items())


# What works


def test_the_weights_are_the_file_s(tmp_path: Path):
    model = load(write(tmp_path))
    assert same(model, load_file(tmp_path / SINGLE))
    assert len(model.state_dict()) == len(weights())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_model_can_be_trained_and_the_file_stays(tmp_path: Path):
    before = (write(tmp_path) / SINGLE).read_bytes()
    model = load(tmp_path)
    model(some_ids(1, 5, vocab_size=64)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not same(model, weights())
    assert (tmp_path / SINGLE).read_bytes() == before


def test_shards_give_the_same_model_as_one_file(tmp_path: Path):
    single, sharded = load(write(tmp_path / "single")), load(write_shards(tmp_path / "sharded"))
    assert same(sharded, weights())
    ids = some_ids(2, 7, vocab_size=64)
    assert torch.equal(single(ids), sharded(ids))


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


def test_a_stored_rope_table_is_harmless(tmp_path: Path):
    table = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(2)}
    assert same(load(write(tmp_path, weights() | table)), weights())


def test_keys_may_lack_the_prefix(tmp_path: Path):
    tensors = {key.removeprefix("model."): tensor for key, tensor in weights().items()}
    assert same(load(write(tmp_path, tensors)), weights())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype):
    tensors = weights(dtype=stored)
    model = load(write(tmp_path, tensors), dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert same(model, {key: tensor.to(wanted) for key, tensor in tensors.items()})


@pytest.mark.parametrize("pad", range(4))
def test_tensors_need_not_be_aligned(tmp_path: Path, pad: int):
    content = (write(tmp_path) / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    with_header(tmp_path, content[8 : 8 + length] + b" " * pad, content[8 + length :])
    assert same(load(tmp_path), weights())


def test_the_attention_is_chosen(tmp_path: Path):
    write(tmp_path)
    for name, chosen in KERNELS.items():
        attentions = [m for m in load(tmp_path, attention=name).modules() if isinstance(m, Attention)]
        assert [attention.kernel for attention in attentions] == [chosen, chosen]
    refusal(tmp_path, "attention", "'flash'", attention="flash")


def test_links_into_the_hub_s_blobs_work(tmp_path: Path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in write_shards(tmp_path / "made").iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert same(load(snapshot), weights())
    (tmp_path / "link").symlink_to(snapshot)
    assert same(load(tmp_path / "link"), weights())


def test_a_read_only_folder_works(tmp_path: Path):
    folder = write(tmp_path / "folder")
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & 0o555)
    before = sorted(folder.iterdir())
    assert same(load(folder), weights())
    assert sorted(folder.iterdir()) == before
    folder.chmod(0o755)


def test_a_header_is_read_without_the_data(tmp_path: Path):
    tensor = read_header(write(tmp_path, weights(dtype=torch.bfloat16)) / SINGLE)[Q]
    assert (tensor.path, tensor.key, tensor.dtype) == (tmp_path / SINGLE, Q, torch.bfloat16)
    assert (tensor.shape, tensor.end - tensor.start) == ((16, 16), 512)


def resident_bytes(file: Path) -> list[int]:
    """How much of the file each of this process's maps of it has in memory."""
    areas = Path("/proc/self/smaps").read_text().split("VmFlags")
    return [
        int(re.findall(r"^Rss: +(\d+)", area, re.MULTILINE)[0]) * 1024 for area in areas if str(file) in area
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_no_second_copy_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: torch.dtype):
    fields = {**FIELDS, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    model = unit_gain_(Llama(LlamaConfig.from_dict(fields))).to(torch.bfloat16)
    file = write(tmp_path, dict(model.state_dict()), **fields) / SINGLE
    size = model.num_parameters() * 2
    mapped: list[list[int]] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
        assert total == size
        yield lambda step: mapped.append(resident_bytes(file))

    monkeypatch.setattr(checkpoint, "byte_progress", progress)
    held = load(tmp_path, dtype=wanted)
    if wanted == torch.bfloat16:  # the pages are the weights: none is copied, none mapped twice
        assert len(mapped[-1]) == 1
        assert sum(mapped[-1]) >= 0.95 * size
    else:  # the pages go as soon as they are converted
        assert max(map(sum, mapped)) < 0.25 * size
        assert resident_bytes(file) == []
    assert held.num_parameters() == model.num_parameters()


# Weight files


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_length(tmp_path: Path, size: int):
    (write(tmp_path) / SINGLE).write_bytes(b"\0" * size)
    refusal(tmp_path, SINGLE, f"{size} bytes cannot hold a header")


@pytest.mark.parametrize("length", [1, 100, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int):
    (write(tmp_path) / SINGLE).write_bytes(struct.pack("<Q", length))
    refusal(tmp_path, SINGLE, f"8 bytes cannot hold a header of {length} bytes")


def test_a_header_over_a_megabyte(tmp_path: Path):
    length = MAX_HEADER_BYTES + 1
    refusal(with_header(tmp_path, b"{}".ljust(length)), SINGLE, "at most 1048576 bytes", str(length))


def test_truncated_data(tmp_path: Path):
    refusal(edited(tmp_path, dict, lambda data: data[:-1]), SINGLE, "truncated", "expected", "got")


def test_trailing_bytes(tmp_path: Path):
    refusal(edited(tmp_path, dict, lambda data: data + b"\0"), SINGLE, "followed by other bytes")


def shift_last(header: dict[str, Any], by: int) -> None:
    last = max(
        (entry for key, entry in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"]
    )
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


def test_a_hole(tmp_path: Path):
    refusal(edited(tmp_path, lambda h: shift_last(h, 4), lambda d: d + b"1234"), SINGLE, "follows a hole")


def test_an_overlap(tmp_path: Path):
    refusal(edited(tmp_path, lambda h: shift_last(h, -4), lambda d: d[:-4]), SINGLE, "overlaps")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"\xff\xfe{}", b'{"a": 1,}', b"[" * 200_000, b'{"a":' * 100_000, b'{"\xed\xa0\x80": 1}'],
)
def test_a_header_that_is_not_json(tmp_path: Path, header: bytes):
    refusal(with_header(tmp_path, header), SINGLE, "not sound JSON")


@pytest.mark.parametrize("header", [b"[]", b"null", b"1", b'"text"'])
def test_a_header_that_is_no_object(tmp_path: Path, header: bytes):
    refusal(with_header(tmp_path, header), SINGLE, "expected a JSON object")


def test_a_duplicate_key(tmp_path: Path):
    entry = b'"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    refusal(with_header(tmp_path, b"{" + entry + b", " + entry + b"}", b"\0" * 4), SINGLE, "'x' occurs twice")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "strides": [1]},
    ],
)
def test_an_entry_of_another_form(tmp_path: Path, entry: Any):
    refusal(
        edited(tmp_path, lambda h: h.update({Q: entry})), SINGLE, Q, "expected dtype, shape and data_offsets"
    )


@pytest.mark.parametrize("name", ["shape", "data_offsets"])
@pytest.mark.parametrize(
    "numbers", [None, 4, "16", {}, [-1, 4], [16.0, 16], ["16", 16], [True, 16], [[16], 16], [9] * 300_000]
)
def test_sizes_that_are_none(tmp_path: Path, name: str, numbers: Any):
    refusal(
        edited(tmp_path, lambda h: h[Q].update({name: numbers})), SINGLE, Q, f"{name} must be a few sizes"
    )


@pytest.mark.parametrize(
    "shape", [[], [16], [16, 15], [16, 16, 2], [0, 16], [2**32, 2**32], [2**63, 16], [10**4000]]
)
def test_a_shape_that_does_not_fill_its_bytes(tmp_path: Path, shape: list[int]):
    refusal(edited(tmp_path, lambda h: h[Q].update(shape=shape)), SINGLE, Q, "does not fill")


@pytest.mark.parametrize(
    "offsets", [[], [0], [0, 1, 2], [4, 0], [0, 2**64], [2**64, 2**64 + 1024], [10**30, 0]]
)
def test_bytes_that_a_shape_does_not_fill(tmp_path: Path, offsets: list[int]):
    refusal(edited(tmp_path, lambda h: h[Q].update(data_offsets=offsets)), SINGLE)


@pytest.mark.parametrize("dtype", ["F12", "f32", "", None, 32, ["F32"], {}])
def test_an_unknown_dtype(tmp_path: Path, dtype: Any):
    refusal(edited(tmp_path, lambda h: h[Q].update(dtype=dtype)), SINGLE, Q, f"dtype {dtype!r}")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_weights_that_are_no_floats(tmp_path: Path, dtype: torch.dtype):
    tensors = weights() | {Q: torch.zeros(16, 16).to(dtype)}
    refusal(write(tmp_path, tensors), SINGLE, Q, "expected F64, F32, BF16, F16", "unquantised")


@pytest.mark.parametrize(
    "tensor", [torch.tensor(1.0), torch.zeros(0, 16), torch.zeros(16, 8), torch.zeros(256)]
)
def test_a_wrong_shape(tmp_path: Path, tensor: Tensor):
    refusal(write(tmp_path, weights() | {Q: tensor}), SINGLE, Q, str(list(tensor.shape)), "[16, 16]")


def test_missing_tensors_are_all_listed(tmp_path: Path):
    tensors = weights()
    gone = [Q, "model.norm.weight", HEAD, EMBEDDING]
    for key in gone:
        del tensors[key]
    refusal(write(tmp_path, tensors), str(tmp_path), "missing", *(key.removeprefix("model.") for key in gone))


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.q_proj.bias", "surprise", "model.model.norm.weight", "new\nline"]
)
def test_an_extra_tensor(tmp_path: Path, key: str):
    name = repr(key.removeprefix("model."))
    refusal(
        write(tmp_path, weights() | {key: torch.zeros(16)}),
        str(tmp_path),
        "missing nothing",
        f"not known {name}",
    )


def test_a_tensor_under_two_names(tmp_path: Path):
    tensors = weights() | {"norm.weight": torch.ones(16)}
    refusal(write(tmp_path, tensors), SINGLE, "'model.norm.weight'", "'norm.weight'", "the same tensor")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_value_that_is_not_finite(tmp_path: Path, value: float, wanted: str):
    broken = weights()[Q].clone()
    broken[3, 5] = value
    refusal(write(tmp_path, weights() | {Q: broken}), SINGLE, Q, "NaN or Inf", dtype=wanted)


def test_a_value_that_overflows_in_16_bits(tmp_path: Path):
    large = weights()[Q].clone()
    large[3, 5] = 1e5
    write(tmp_path, weights() | {Q: large})
    refusal(tmp_path, SINGLE, Q, "float16", "use float32", dtype="float16")
    assert load(tmp_path, dtype="bfloat16").state_dict()[Q.removeprefix("model.")][3, 5] > 9e4


def test_a_git_lfs_pointer(tmp_path: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2200119864\n"
    (write(tmp_path) / SINGLE).write_text(pointer)
    refusal(tmp_path, SINGLE, "Git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str):
    write(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / name)
    refusal(tmp_path, str(tmp_path), name, "pickle")


def test_as_many_layers_as_the_config_says(tmp_path: Path):
    refusal(write(tmp_path, num_hidden_layers=3), str(tmp_path), "config.json has 3 layers, the weights 2")
    refusal(write(tmp_path, num_hidden_layers=1_000_000), "config.json has 1000000 layers, the weights 2")


@cache
def valid_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return (write(Path(folder)) / SINGLE).read_bytes()


HEADER_END = 8 + int.from_bytes(valid_file()[:8], "little")


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """The valid file with some bytes of length and header changed, put in or taken out, or cut short."""
    content = bytearray(valid_file())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, HEADER_END - 1))
        byte = draw(st.one_of(st.sampled_from(b'0123456789-.{}[]",:\\ eE'), st.integers(0, 255)))
        content[at : at + draw(st.sampled_from([0, 1, 1, 1, 2]))] = bytes([byte])
    cut = draw(st.one_of(st.none(), st.integers(0, len(content))))
    return bytes(content[:cut])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(content=damaged_files())
def test_a_damaged_file_is_refused_or_loads_correctly(content: bytes):
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name))
        (folder / SINGLE).write_bytes(content)
        try:
            assert same(load(folder), weights())
        except InputError as error:
            message = str(error)
        else:
            message = ""
    assert "\n" not in message


# Paths


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "/etc/outside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "nul\0.safetensors",
        "pytorch_model.bin",
        "..",
        "",
    ],
)
def test_a_shard_s_name_must_be_plain(tmp_path: Path, name: str):
    folder = write_shards(tmp_path / "folder")
    save_file(weights(), tmp_path / "outside.safetensors")
    write_index(folder, dict.fromkeys(weights(), name))
    refusal(folder, INDEX, "plain names", repr(name))


@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-00002-of-00002.safetensors"])
def test_a_link_that_leaves_the_folder(tmp_path: Path, name: str):
    folder = write(tmp_path / "folder") if name == SINGLE else write_shards(tmp_path / "folder")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refusal(folder, str(folder / name), "link that leaves the folder", str(outside))


def test_blobs_count_for_the_hub_s_layout_only(tmp_path: Path):
    folder = tmp_path / "models" / "folder"
    folder.parent.mkdir()
    write(folder)
    (tmp_path / "blobs").mkdir()
    (folder / SINGLE).rename(tmp_path / "blobs" / "weights")
    (folder / SINGLE).symlink_to("../../blobs/weights")
    refusal(folder, "link that leaves the folder")


@pytest.mark.parametrize("target", ["nowhere", SINGLE])
def test_a_link_that_leads_nowhere(tmp_path: Path, target: str):
    (write(tmp_path) / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to(target)
    refusal(tmp_path, SINGLE, "expected a regular file")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-00001-of-00002.safetensors"])
def test_what_is_not_a_regular_file(tmp_path: Path, make: Callable[[Path], None], name: str):
    folder = write(tmp_path / "folder") if name == SINGLE else write_shards(tmp_path / "folder")
    (folder / name).unlink()
    make(folder / name)
    refusal(folder, str(folder / name), "expected a regular file")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="has no /dev/zero")
def test_a_device(tmp_path: Path):
    with pytest.raises(InputError, match="/dev/zero: expected a regular file"):
        read_header(Path("/dev/zero"))
    (write(tmp_path) / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to("/dev/zero")
    refusal(tmp_path, "/dev/zero")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=f"{SINGLE}: cannot be read .Permission denied"):
        read_header(tmp_path / SINGLE)


def test_a_file_that_changes_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check = checkpoint._check_tensors

    def check_and_truncate(*args: Any) -> None:
        check(*args)
        os.truncate(tmp_path / SINGLE, 100)

    write(tmp_path)
    monkeypatch.setattr(checkpoint, "_check_tensors", check_and_truncate)
    refusal(tmp_path, SINGLE, "cannot be loaded")


def test_absent_shards_are_all_listed(tmp_path: Path):
    write_shards(tmp_path)
    for i in (1, 2):
        (tmp_path / f"model-0000{i}-of-00002.safetensors").unlink()
    refusal(
        tmp_path, str(tmp_path), "missing model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"
    )


def test_a_tensor_in_two_shards(tmp_path: Path):
    write_shards(tmp_path)
    weight_map = read_index(tmp_path)
    other = tmp_path / next(shard for shard in weight_map.values() if shard != weight_map[Q])
    save_file(load_file(other) | {Q: weights()[Q]}, other)
    refusal(tmp_path, repr(Q), "is in both", *set(weight_map.values()))


def test_an_index_that_lists_what_is_not_there(tmp_path: Path):
    write_shards(tmp_path)
    weight_map = read_index(tmp_path)
    write_index(tmp_path, weight_map | {"ghost": weight_map[Q]})
    refusal(tmp_path, INDEX, "'ghost'", "lies in none")


def test_an_index_that_lacks_what_is_there(tmp_path: Path):
    write_shards(tmp_path)
    weight_map = read_index(tmp_path)
    shard = weight_map.pop(Q)
    write_index(tmp_path, weight_map)
    refusal(tmp_path, INDEX, repr(Q), "listed in no file", f"lies in {shard}")


def test_an_index_that_names_the_wrong_shard(tmp_path: Path):
    write_shards(tmp_path)
    weight_map = read_index(tmp_path)
    wrong = next(shard for shard in weight_map.values() if shard != weight_map[Q])
    write_index(tmp_path, weight_map | {Q: wrong})
    refusal(tmp_path, INDEX, repr(Q), f"listed in {wrong}")


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {Q: None}, {Q: 1}, {Q: [SINGLE]}])
def test_an_index_of_another_form(tmp_path: Path, weight_map: Any):
    write_index(write_shards(tmp_path), weight_map)
    refusal(tmp_path, INDEX, "weight_map")


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_an_index_that_is_not_json(tmp_path: Path, content: str):
    (write_shards(tmp_path) / INDEX).write_text(content)
    refusal(tmp_path, INDEX, "JSON" if content else "the file is empty")


def test_an_empty_index(tmp_path: Path):
    write_index(write_shards(tmp_path), {})
    refusal(tmp_path, "config.json has 2 layers, the weights 0")


def test_a_single_file_and_an_index(tmp_path: Path):
    write_shards(tmp_path)
    save_file(weights(), tmp_path / SINGLE)
    refusal(tmp_path, str(tmp_path), f"both {SINGLE} and {INDEX}")


def test_a_partial_folder(tmp_path: Path):
    refusal(tmp_path / "absent", str(tmp_path / "absent"), "no such folder")
    refusal(tmp_path, "config.json", "no such file")
    (write(tmp_path) / SINGLE).unlink()
    refusal(tmp_path, str(tmp_path), SINGLE, INDEX, "found neither")


# Running


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_absent(tmp_path: Path, device: str):
    refusal(write(tmp_path), f"device: {device}", "no CUDA device", device=device)


def test_a_cuda_device_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refusal(write(tmp_path), "device: cuda:2", "none after cuda:1", device="cuda:2")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "mps", None, 1.5])
def test_a_device_of_another_kind(tmp_path: Path, device: Any):
    refusal(write(tmp_path), "device: expected cpu, cuda or cuda:N", device=device)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "Tensor", "", None, torch.int64])
def test_a_dtype_of_another_kind(tmp_path: Path, dtype: Any):
    refusal(write(tmp_path), "dtype: expected float32", repr(dtype), dtype=dtype)


def test_not_enough_memory_is_said_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "free_memory", lambda device: 3_000_000_000)
    monkeypatch.setattr(checkpoint, "_read", None)
    write(tmp_path, vocab_size=2_000_000, hidden_size=1024)
    refusal(tmp_path, "memory", "GB", "3.0 GB free", dtype="float32")


def test_a_bomb_is_refused_from_its_size_alone(tmp_path: Path):
    refusal(write(tmp_path, vocab_size=2**31 - 1, hidden_size=2**20), "config.json", "parameters")


def test_memory_that_runs_out_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full:
        def get_tensor(self, key: str) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 is full.")

    monkeypatch.setattr(checkpoint, "safe_open", lambda path, framework: Full())
    refusal(write(tmp_path), SINGLE, "cannot be loaded", "CUDA out of memory")


def test_free_memory_is_plausible():
    free = device.free_memory(torch.device("cpu"))
    assert free is None or 1e7 < free < 1e14
