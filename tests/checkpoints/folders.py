"""Tiny checkpoint folders, sound ones and damaged ones, and what loading them gives."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.shapes import TINY, tiny_config
from tinyllama.checkpoints.files import INDEX, SINGLE
from tinyllama.checkpoints.load import load_model
from tinyllama.errors import InputError
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
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@cache
def _weights(tied: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    model = unit_gain_(Llama(tiny_config(**{**FIELDS, "tie_word_embeddings": tied})))
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    save_file(weights() if tensors is None else tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def write_shards(folder: Path) -> dict[str, str]:
    """A checkpoint folder of two shards, the tensors dealt out in turn; gives the index's `weight_map`."""
    (write(folder) / SINGLE).unlink()
    weight_map = {key: SHARDS[i % 2] for i, key in enumerate(weights())}
    for name in SHARDS:
        save_file({key: weights()[key] for key, shard in weight_map.items() if shard == name}, folder / name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file: the header as JSON, or as these bytes, and the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def load(folder: Path, device: str = "cpu", dtype: Any = "float32", **options: Any) -> Llama:
    return load_model(folder, device=device, dtype=dtype, **options)


def refusal(folder: Path, *parts: str, **options: Any) -> None:
    """Loading fails with an InputError: one line, with all these parts."""
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for part in parts:
        assert part in message


def same(model: Llama, tensors: dict[str, Tensor]) -> bool:
    """Whether the model holds exactly these tensors."""
    state = model.state_dict()
    return all(torch.equal(state[key.removeprefix("model.")], tensor) for key, tensor in tensors.items())
