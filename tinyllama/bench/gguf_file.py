"""A checkpoint folder -> the GGUF file that llama.cpp reads, of the very same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from tinyllama.checkpoints.config_file import read_config
from tinyllama.checkpoints.embedded import LAYER_TENSORS
from tinyllama.checkpoints.headers import find_tensors
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError

if TYPE_CHECKING:
    import gguf
    import numpy as np

KINDS = ("F16", "Q8_0")
PARTS = {ours: theirs for theirs, ours in LAYER_TENSORS.items()}
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, path: Path, kind: str) -> int:
    """Write the folder's weights as GGUF; the bytes of the tensors that each token reads.

    Matrices are F16 or Q8_0 (blocks of 32 int8 with a float16 scale), norm weights float32, as llama.cpp's
    own converter has them. The file has no tokenizer: it is fed ids.

    Args:
        folder: the checkpoint.
        path: the file to write.
        kind: one of KINDS.

    Raises:
        InputError: `gguf` is not installed, or the checkpoint has scaled RoPE, which this does not write.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError("gguf is not installed: pip install gguf")
    import gguf

    config = read_config(folder)
    if config.rope_scaling is not None:
        raise InputError("rope_scaling: cannot be written as GGUF here; use a shape without it")
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    _write_settings(writer, config, gguf.LlamaFileType[f"MOSTLY_{kind}"])
    tied = config.tie_word_embeddings
    read = 0
    for name, shape in _shapes(folder, tied).items():
        matrix = len(shape) == 2
        stored = quantisation if matrix else gguf.GGMLQuantizationType.F32
        size = gguf.quant_shape_to_byte_shape(shape, stored) if matrix else (shape[0] * 4,)
        count = size[0] * size[-1] if matrix else size[0]
        writer.add_tensor_info(name, shape, None, count, raw_dtype=stored)
        read += count if name != "token_embd.weight" or tied else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in _tensors(folder, config):  # one at a time: a billion weights in float32 would take 4 GB
        writer.write_tensor_data(_stored(values, quantisation))
    writer.close()
    return read


def _write_settings(writer: gguf.GGUFWriter, config: LlamaConfig, file_type: int) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")


def _name(ours: str) -> str:
    """`layers.3.mlp.up_proj.weight` as `blk.3.ffn_up.weight`."""
    stem = ours.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{ENDS[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.weight"


def _shapes(folder: Path, tied: bool) -> dict[str, tuple[int, ...]]:
    stored = find_tensors(folder).items()
    return {_name(ours): tuple(t.shape) for ours, t in stored if not (tied and ours == "lm_head.weight")}


def _stored(values: torch.Tensor, quantisation: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix as it is stored, a vector in float32."""
    import gguf

    if values.ndim == 1:
        return values.numpy()
    if quantisation == gguf.GGMLQuantizationType.F16:
        return values.half().numpy()  # as gguf does it, on all cores
    return gguf.quants.quantize(values.numpy(), quantisation)


def _tensors(folder: Path, config: LlamaConfig) -> Iterator[torch.Tensor]:
    """Every tensor in float32, in the order of `_shapes`."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for ours, tensor in find_tensors(folder).items():
        if config.tie_word_embeddings and ours == "lm_head.weight":
            continue
        with safe_open(tensor.path, framework="pt") as file:
            values = file.get_tensor(tensor.key).to(torch.float32)
        part = ours.split(".")[-2]
        yield (permute(values, heads[part]) if part in heads else values).contiguous()


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a q or k projection, (heads * D, C), into llama.cpp's order; `embedded.unpermute` back.

    llama.cpp rotates rows 2i and 2i + 1, Hugging Face rows i and i + D/2 (llama.cpp, convert_hf_to_gguf.py,
    LlamaModel.permute).
    """
    halves = weight.view(heads, 2, -1, weight.shape[-1])  # (heads, 2, D/2, C)
    return halves.transpose(1, 2).reshape(weight.shape)
