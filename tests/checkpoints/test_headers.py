"""Finding a checkpoint's tensors: what files may hold, where they may be, and what each fault is called."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoints.folders import (
    HEAD,
    SHARDS,
    Q,
    file_of,
    load,
    refusal,
    same,
    weights,
    write,
    write_index,
    write_shards,
)
from tests.marks import unix
from tinyllama.checkpoints.files import INDEX, SINGLE
from tinyllama.checkpoints.headers import MAX_HEADER_BYTES, read_header
from tinyllama.errors import InputError

DATA = bytes(8)


def entry(**changes: Any) -> dict[str, Any]:
    """Two float32 values at the start of the data, with these fields changed."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def twice(key: str, value: Any) -> bytes:
    """A JSON object that has one key twice."""
    pair = f"{json.dumps(key)}: {json.dumps(value)}"
    return f"{{{pair}, {pair}}}".encode()


def test_a_header_is_read_without_the_data(tmp_path: Path):
    tensor = read_header(write(tmp_path, weights(dtype=torch.bfloat16)) / SINGLE)[Q]
    assert (tensor.path, tensor.key, tensor.dtype) == (tmp_path / SINGLE, Q, torch.bfloat16)
    assert (tensor.shape, tensor.nbytes) == ((16, 16), 512)


# --- one file --------------------------------------------------------------------------------------------

MALFORMED = {
    "shorter than a length": bytes(7),
    "longer header than file": struct.pack("<Q", 100),
    "header of 2^63 bytes": struct.pack("<Q", 2**63),
    "header over a megabyte": file_of(b"{}".ljust(MAX_HEADER_BYTES + 1)),
    "truncated": file_of({"x": entry()}, DATA[:-1]),
    "trailing byte": file_of({"x": entry()}, DATA + b"\0"),
    "hole": file_of({"x": entry(), "y": entry(data_offsets=[12, 20])}, bytes(20)),
    "overlap": file_of({"x": entry(), "y": entry(data_offsets=[4, 12])}, bytes(12)),
    "shared span": file_of({"x": entry(), "y": entry()}, DATA),
    "shape smaller than span": file_of({"x": entry(shape=[])}, DATA),
    "shape larger than span": file_of({"x": entry(shape=[2, 2])}, DATA),
    "negative dimension": file_of({"x": entry(shape=[-2])}, DATA),
    "overflowing shape": file_of({"x": entry(shape=[2**32, 2**32, 2])}, DATA),
    "overflowing dimension": file_of({"x": entry(shape=[10**4000])}, DATA),
    "many dimensions": file_of({"x": entry(shape=[9] * 300_000)}, DATA),
    "dimension true": file_of({"x": entry(shape=[True, 2])}, DATA),
    "dimension 2.0": file_of({"x": entry(shape=[2.0])}, DATA),
    "backward span": file_of({"x": entry(data_offsets=[8, 0])}, DATA),
    "overflowing span": file_of({"x": entry(data_offsets=[2**64, 2**64 + 8])}, DATA),
    "no span": file_of({"x": {"dtype": "F32", "shape": [2]}}, DATA),
    "entry that is no object": file_of({"x": None}, DATA),
    "unknown dtype": file_of({"x": entry(dtype="F12")}, DATA),
    "dtype with a line break": file_of({"x": entry(dtype="F\n12")}, DATA),
    "dtype that is no string": file_of({"x": entry(dtype=32)}, DATA),
    "not UTF-8": file_of(b'{"\xed\xa0\x80": 1}'),
    "not JSON": file_of(b'{"a": 1,}'),
    "JSON list": file_of(b"[]"),
    "deeply nested": file_of(b'{"a":' * 100_000),
    "huge number in an unknown field": file_of(
        json.dumps({"x": entry(more=0)}).replace('"more": 0', f'"more": {"9" * 5000}').encode(), DATA
    ),
    "name twice": file_of(twice("x", entry()), DATA),
}


# What the message must say besides the file and what to do.
NAMED = {
    "header over a megabyte": [str(MAX_HEADER_BYTES), str(MAX_HEADER_BYTES + 1)],
    "truncated": [f"got {len(MALFORMED['truncated'])} bytes"],
    "unknown dtype": ["F12", "BF16"],
    "name twice": ["'x'", "twice"],
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_file_is_refused(tmp_path: Path, fault: str):
    (write(tmp_path) / SINGLE).write_bytes(MALFORMED[fault])
    refusal(tmp_path, f"{tmp_path / SINGLE}: ", "download the checkpoint again", *NAMED.get(fault, []))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype):
    write(tmp_path, weights() | {Q: torch.zeros(16, 16).to(dtype)})
    refusal(tmp_path, SINGLE, Q, "F64, F32, BF16, F16", "unquantised")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path):
    write(tmp_path, weights() | {"norm.weight": torch.ones(16)})
    refusal(tmp_path, SINGLE, "'model.norm.weight'", "'norm.weight'", "the same tensor")


@settings(max_examples=50, derandomize=True)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_loads_correctly(tmp_path_factory: Any, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    content = bytearray((write(folder) / SINGLE).read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, header_end - 1))
        byte = data.draw(st.one_of(st.sampled_from(b'0123456789-.{}[]",:\\ eE'), st.integers(0, 255)))
        content[at : at + data.draw(st.sampled_from([0, 1, 1, 1, 2]))] = bytes([byte])
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (folder / SINGLE).write_bytes(content[:cut])
    with contextlib.suppress(InputError):
        assert same(load(folder), weights())


# --- which files -----------------------------------------------------------------------------------------


def folder_with(folder: Path, name: str) -> Path:
    """A checkpoint folder that has the file of this name."""
    if name == SINGLE:
        write(folder)
    else:
        write_shards(folder)
    return folder


def test_a_git_lfs_pointer_is_refused(tmp_path: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2200119864\n"
    (write(tmp_path) / SINGLE).write_text(pointer)
    refusal(tmp_path, SINGLE, "Git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str):
    write(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / name)
    refusal(tmp_path, str(tmp_path), name, "pickle")


def test_a_partial_folder_is_refused_by_what_it_lacks(tmp_path: Path):
    refusal(tmp_path / "absent", str(tmp_path / "absent"), "no such folder")
    refusal(tmp_path, "config.json", "no such file")
    (write(tmp_path) / SINGLE).unlink()
    refusal(tmp_path, str(tmp_path), SINGLE, INDEX)
    write_shards(tmp_path)
    for name in SHARDS:
        (tmp_path / name).unlink()
    refusal(tmp_path, str(tmp_path), *SHARDS)


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path):
    write_shards(tmp_path)
    save_file(weights(), tmp_path / SINGLE)
    refusal(tmp_path, str(tmp_path), SINGLE, INDEX)


@pytest.mark.parametrize(
    "make",
    [
        os.mkdir,
        pytest.param(lambda path: os.mkfifo(path), marks=unix),
        pytest.param(lambda path: path.symlink_to("nowhere"), marks=unix),
    ],
)
@pytest.mark.parametrize("name", [SINGLE, INDEX, SHARDS[0]])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], None], name: str):
    folder = folder_with(tmp_path / "folder", name)
    (folder / name).unlink()
    make(folder / name)
    refusal(folder, str(folder / name), "expected a regular file")


@pytest.mark.parametrize("name", [SINGLE, INDEX, SHARDS[1]])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, name: str):
    # "blobs" is allowed only in the layout of the Hub's cache, which this is not. A key or a password is not
    # named as weights are.
    folder = folder_with(tmp_path / "models" / "folder", name)
    outside = tmp_path / "blobs" / "outside"
    outside.parent.mkdir()
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refusal(folder, str(folder / name), "link", str(outside))


@pytest.mark.parametrize("name", [SINGLE, INDEX, SHARDS[1]])
def test_a_link_to_a_file_of_the_same_ending_works(tmp_path: Path, name: str):
    folder = folder_with(tmp_path / "models" / "folder", name)
    (folder / name).rename(tmp_path / f"other-{name}")
    (folder / name).symlink_to(tmp_path / f"other-{name}")
    assert same(load(folder), weights())


def test_links_from_any_folder_into_a_cache_of_the_hub_work(tmp_path: Path):
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    write_shards(tmp_path / "made")
    for file in (tmp_path / "made").glob("*.safetensors*"):
        (tmp_path / "made" / file.name).rename(blobs / f"hash-of-{file.name}.blob")
        file.symlink_to(blobs / f"hash-of-{file.name}.blob")
    assert same(load(tmp_path / "made"), weights())


def test_links_into_the_blobs_of_the_hub_s_cache_work(tmp_path: Path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_shards(tmp_path / "made")
    for file in (tmp_path / "made").iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert same(load(snapshot), weights())
    (tmp_path / "link").symlink_to(snapshot)
    assert same(load(tmp_path / "link"), weights())


# --- shards and their index ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "C:x.safetensors", "x.bin", ""],
)
def test_a_shard_s_name_must_be_plain(tmp_path: Path, name: str):
    folder = tmp_path / "folder"
    write_shards(folder)
    save_file(weights(), tmp_path / "outside.safetensors")
    write_index(folder, dict.fromkeys(weights(), name))
    refusal(folder, INDEX, repr(name))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    weight_map = write_shards(tmp_path)
    other = tmp_path / next(shard for shard in SHARDS if shard != weight_map[Q])
    save_file(load_file(other) | {Q: weights()[Q]}, other)
    refusal(tmp_path, repr(Q), *SHARDS)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"ghost": SHARDS[0], "spook": SHARDS[1]}, ["'ghost'", "'spook'"]),
        ({Q: None}, [repr(Q), "no file"]),
        ({Q: SHARDS[0], HEAD: SHARDS[0]}, [*SHARDS]),
    ],
    ids=["lists what is not there", "lacks what is there", "names the wrong shard"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, change: dict[str, str | None], parts: list[str]
):
    changed = write_shards(tmp_path) | change
    write_index(tmp_path, {key: shard for key, shard in changed.items() if shard})
    refusal(tmp_path, INDEX, *parts)


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {Q: 1}])
def test_an_index_of_another_form_is_refused(tmp_path: Path, weight_map: Any):
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    refusal(tmp_path, INDEX, "weight_map")


def test_an_empty_index_lacks_every_tensor(tmp_path: Path):
    write_shards(tmp_path)
    write_index(tmp_path, {})
    refusal(tmp_path, HEAD, "model.layers.0.self_attn.q_proj.weight")
