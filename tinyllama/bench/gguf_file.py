"""A checkpoint folder -> the GGUF file of the same weights that llama.cpp reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from tinyllama.bench.peers import require
from tinyllama.checkpoints.config_file import read_config
from tinyllama.checkpoints.embedded import LAYER_TENSORS
from tinyllama.checkpoints.headers import find_tensors
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError

if TYPE_CHECKING:
    import gguf
    import numpy as np

LAYER_PARTS = {ours: theirs for theirs, ours in LAYER_TENSORS.items()}
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the folder's weights as GGUF, without a tokenizer.

    As in llama.cpp's own converter matrices have the kind that was asked for and norm weights are float32.

    Args:
        folder: the checkpoint.
        path: the file to write.
        kind: "F16", or "Q8_0": blocks of 32 int8 with a float16 scale.

    Raises:
        InputError: `gguf` is not installed, or the checkpoint has scaled RoPE or a window.
    """
    require("gguf", "pip install gguf")
    import gguf

    config = read_config(folder)
    for name in ("rope_scaling", "sliding_window"):
        if getattr(config, name) is not None:
            raise InputError(f"{name}: cannot be written as GGUF here; use a shape without it")
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer, config, gguf.LlamaFileType[f"MOSTLY_{kind}"])
    tensors = find_tensors(folder)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        stored = quantisation if len(tensor.shape) == 2 else gguf.GGMLQuantizationType.F32
        *rows, size = gguf.quant_shape_to_byte_shape(tensor.shape, stored)
        writer.add_tensor_info(gguf_name(name), tensor.shape, None, size * (rows or [1])[0], raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tensors.items():  # one at a time: in float32 a billion weights would take 4 GB
        with safe_open(tensor.path, framework="pt") as file:
            values = file.get_tensor(tensor.key).to(torch.float32)
        part = name.split(".")[-2]
        values = permute(values, heads[part]) if part in heads else values
        writer.write_tensor_data(stored_values(values.contiguous(), quantisation))
    writer.close()


def write_settings(writer: gguf.GGUFWriter, config: LlamaConfig, file_type: int) -> None:
    """Write the config, under GGUF's names."""
    writer.add_context_length(config.context)
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


def gguf_name(ours: str) -> str:
    """`layers.3.mlp.up_proj.weight` as `blk.3.ffn_up.weight`."""
    stem = ours.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{ENDS[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{LAYER_PARTS[part]}.weight"


def stored_values(values: torch.Tensor, quantisation: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix as it is stored, a vector in float32."""
    import gguf

    if values.ndim == 1:
        return values.numpy()
    if quantisation == gguf.GGMLQuantizationType.F16:
        return values.half().numpy()  # the same values as gguf's own, but on all cores
    return gguf.quants.quantize(values.numpy(), quantisation)


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a q or k projection, (heads * D, C), into llama.cpp's order; `unpermute` undoes it.

    llama.cpp rotates rows 2i and 2i + 1, Hugging Face rows i and i + D/2 (llama.cpp, convert_hf_to_gguf.py,
    LlamaModel.permute).
    """
    halves = weight.view(heads, 2, -1, weight.shape[-1])  # (heads, 2, D/2, C)
    return halves.transpose(1, 2).reshape(weight.shape)
