"""Text <-> ids, against sentencepiece and transformers, and what damaged files get."""

import re

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from tests.text.tiny_tokenizers import (
    LLAMA_SPECIAL,
    adds,
    find_llama_folder,
    json_definition,
    sentencepiece_folder,
    write_json,
)
from tinyllama.errors import InputError
from tinyllama.text.tokenizer import Tokenizer
from tinyllama.text.vocabulary import SPACE

texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def llama_pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(find_llama_folder() / "tokenizer.model"))


# Encoding


@given(parts=st.lists(st.one_of(texts, st.sampled_from([*LLAMA_SPECIAL, "a", " ", "\n", "  b", "</", "s>"]))))
def test_llama_ids_are_those_of_sentencepiece_for_each_part_between_special_tokens(
    llama, llama_pieces, parts
):
    expected = [1]
    for part in re.split("(<unk>|<s>|</s>)", "".join(parts)):
        expected += [LLAMA_SPECIAL[part]] if part in LLAMA_SPECIAL else llama_pieces.encode(part)
    assert llama.encode("".join(parts)) == expected


@given(
    parts=st.lists(
        st.sampled_from(["a", " ", "12", "é", "你", "<|im_end|>", "<|im_start|>", "<|im", "_end|>"])
    )
)
def test_smollm2_ids_are_those_of_transformers(smollm2, smollm2_reference, parts):
    assert smollm2.encode("".join(parts)) == smollm2_reference.encode("".join(parts))


@given(text=texts)
def test_a_text_survives_encoding_and_decoding(llama, smollm2, text):
    # The one exception: to sentencepiece, "▁" is how a space is spelled.
    assert llama.decode(llama.encode(text), skip_special=True) == text.replace(SPACE, " ")
    # SmolLM2's vocabulary lacks a few bytes. transformers drops their characters silently.
    try:
        ids = smollm2.encode(text)
    except InputError:
        assert set(text.encode()) & {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    else:
        assert smollm2.decode(ids) == text


def test_a_character_of_several_tokens_stands_beside_the_first(llama, smollm2):
    bytewise = llama.explain("a 佒b")
    assert [row.piece for row in bytewise.tokens[2:]] == ["▁", "<0xE4>", "<0xBD>", "<0x92>", "b"]
    assert [row.text for row in bytewise.tokens[2:]] == [" ", "佒", "", "", "b"]
    found = smollm2.explain("你好")
    assert [row.text for row in found.tokens] == ["你", "", "好", ""]
    assert [line.split("│")[-2].strip() for line in repr(found).splitlines()[3:7]] == ["你", "↑", "好", "↑"]
    cells = re.findall("<td[^>]*>(.*?)</td>", found._repr_html_())
    assert cells[5::6] == ["你", "↑", "好", "↑"]


def test_what_cannot_be_encoded_is_refused(llama, smollm2):
    with pytest.raises(InputError, match=r"character U\+0014 at index 2 has no token"):
        smollm2.encode("ab\x14c")
    with pytest.raises(InputError, match=r"lone surrogate U\+D83D at index 3"):
        llama.encode("abc\ud83d")
    with pytest.raises(InputError, match="expected a str, got bytes"):
        llama.encode(b"abc")


def test_bos_and_the_named_tokens(llama, smollm2):
    assert llama.encode("") == [1]
    assert llama.encode("Hello", bos=False) == [15043]
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 1, 2, 2)
    assert llama.special_ids == {0, 1, 2}
    assert smollm2.encode("") == []
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (49152, 1, 2, 2)
    assert smollm2.special_ids == set(range(17))
    assert "vocab_size=49152" in repr(smollm2)
    assert "'eos': ('<|im_end|>', 2)" in repr(smollm2)


def test_a_token_as_piece_and_as_bytes(llama, smollm2):
    assert (llama.piece(15043), llama.token_bytes(15043)) == ("▁Hello", b" Hello")
    assert (llama.piece(13), llama.token_bytes(13)) == ("<0x0A>", b"\n")
    assert (llama.piece(2), llama.token_bytes(2)) == ("</s>", b"</s>")
    (world,) = smollm2.encode(" world")
    assert (smollm2.piece(world), smollm2.token_bytes(world)) == ("Ġworld", b" world")


# The dummy prefix of the later parts


def test_llama_without_legacy_has_the_ids_of_transformers_5(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((find_llama_folder() / "tokenizer.model").read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"legacy": False})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("</s>\n") == [1, 2, 13]
    assert tokenizer.encode("Hello</s>b</s> c") == [1, 15043, 2, 29890, 2, 274]
    assert tokenizer.decode([2, 29890]) == "</s>b"


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


@pytest.mark.parametrize(
    ("components", "legacy", "prefixed"),
    [
        ({}, False, True),  # Prepend: the official TinyLlama folder
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always"}}, False, True),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, True, False),
        ({"normalizer": None}, False, False),
        ({"normalizer": None}, True, True),
        ({"normalizer": None}, None, True),
    ],
)
def test_a_tokenizer_json_beside_the_model_decides_on_the_prefix(tmp_path, components, legacy, prefixed):
    folder = sentencepiece_folder(tmp_path, legacy=legacy)
    write_json(folder / "tokenizer.json", json_definition(**components))
    tokenizer = Tokenizer.from_folder(folder)
    pieces = [tokenizer.piece(index) for index in tokenizer.encode("</s>\n", bos=False)]
    assert pieces == (["</s>", "▁", "<0x0A>"] if prefixed else ["</s>", "<0x0A>"])


# Decoding


@given(ids=st.lists(st.one_of(st.integers(131, 258), st.integers(3, 31999))))
def test_llama_decodes_as_sentencepiece(llama, llama_pieces, ids):
    # Half the ids are lone bytes above 127: invalid UTF-8 must give as many U+FFFD as the library gives.
    assert llama.decode(ids) == llama_pieces.decode(ids)


@given(ids=st.lists(st.one_of(st.integers(111, 238), st.integers(0, 49151))), skip=st.booleans())
def test_smollm2_decodes_as_transformers(smollm2, smollm2_reference, ids, skip):
    # Most of the tokens from 111 to 238 are lone bytes above 127.
    expected = smollm2_reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert smollm2.decode(ids, skip_special=skip) == expected


@given(ids=st.lists(st.one_of(st.integers(0, 258), st.integers(0, 31999))), cut=st.integers(0, 20))
def test_a_stream_continues_its_context(llama, ids, cut):
    before, after = ids[:cut], ids[cut:]
    ahead = llama.stream(skip_special=True)
    known = "".join(map(ahead.feed, before))
    stream = llama.stream(context=before, skip_special=True)
    assert known + "".join(map(stream.feed, after)) + stream.flush() == llama.decode(ids, skip_special=True)


def test_a_stream_holds_an_unfinished_character_back(llama):
    ids = llama.encode("👍", bos=False)
    assert [llama.piece(index) for index in ids] == ["▁", "<0xF0>", "<0x9F>", "<0x91>", "<0x8D>"]
    stream = llama.stream()
    assert [stream.feed(index) for index in ids] == ["", "", "", "", "👍"]
    cut_short = llama.stream()
    assert [cut_short.feed(index) for index in ids[:-1]] == [""] * 4
    assert cut_short.flush() == "\ufffd" * 3


def test_the_first_space_is_dropped_only_if_no_text_precedes(llama):
    hello = llama.encode("Hello", bos=False)
    assert llama.stream().feed(hello[0]) == "Hello"
    assert llama.stream(context=[1]).feed(hello[0]) == "Hello"
    assert llama.stream(context=hello).feed(hello[0]) == " Hello"
    assert llama.decode([1, *hello], skip_special=True) == "Hello"
    assert llama.decode(torch.tensor([1, *hello])) == "<s> Hello"


@pytest.mark.parametrize("index", [-1, 32000, 10**20])
def test_an_id_outside_the_vocabulary_is_refused(llama, index):
    for use in (llama.piece, llama.token_bytes, lambda i: llama.decode([i])):
        with pytest.raises(InputError, match=rf"id {index} .* 0 to 31999"):
            use(index)


# Added tokens


def test_added_tokens_extend_a_model_and_the_longest_wins(tmp_path):
    config = {
        "added_tokens_decoder": {
            "400": {"content": "<end>", "special": True},
            "401": {"content": "<end>ing", "special": False},
        }
    }
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path, **config))
    assert tokenizer.vocab_size == 402
    ids = tokenizer.encode("<end>ing<end>", bos=False)
    assert ids == [401, 400]
    assert tokenizer.decode(ids) == "<end>ing<end>"
    # As in transformers, only the special ones are skipped.
    assert tokenizer.decode(ids, skip_special=True) == "<end>ing"
    with pytest.raises(InputError, match="id 399"):
        tokenizer.decode([399])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "<none>"}, "bos_token is '<none>', which is not in the vocabulary"),
        ({"bos_token": 7}, "bos_token is 7, expected a string"),
        ({"bos_token": None, "add_bos_token": True}, "there is no bos_token"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes', expected true or false"),
        ({"add_eos_token": True}, "add_eos_token is true, which is not supported"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added tokens malformed"),
        ({"added_tokens_decoder": {"5": {}}}, "added tokens malformed"),
        ({"chat_template": 5}, "chat_template malformed"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(sentencepiece_folder(tmp_path, **config))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# tokenizer.json


FIRST_ONLY = {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}


@pytest.mark.parametrize("components", [{}, FIRST_ONLY], ids=["every part", "first part"])
@settings(max_examples=50)
@given(parts=st.lists(st.sampled_from(["a", "b", " ", "é", "\n", "</s>", "<unk>"])))
def test_a_sentencepiece_like_json_has_the_library_s_ids_and_texts(tmp_path_factory, components, parts):
    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "tokenizer.json", json_definition(**components))
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    ids = library.encode("".join(parts)).ids
    assert tokenizer.encode("".join(parts)) == ids
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


def test_the_post_processor_decides_on_bos_unless_the_config_does(tmp_path):
    # Llama 3 has it as the second of two processors.
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    processors = {"type": "Sequence", "processors": [byte_level, adds("<s> $A")]}
    write_json(tmp_path / "tokenizer.json", json_definition(post_processor=processors))
    assert Tokenizer.from_folder(tmp_path).encode("a")[0] == 1
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert Tokenizer.from_folder(tmp_path).encode("a")[0] != 1


def test_a_stored_truncation_does_not_cut_texts(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    write_json(tmp_path / "tokenizer.json", json_definition(truncation=truncation))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a b a b a b")) == "a b a b a b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, r"decoder \['WordPiece'\]"),
        ({"decoder": None}, r"decoder \[\]"),
        ({"decoder": 5}, "decoder malformed"),
        ({"decoder": {"type": "Sequence"}}, "decoder malformed"),
        ({"added_tokens": [5]}, "added tokens malformed"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "not a usable tokenizer"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "post_processor malformed"),
        ({"post_processor": adds("$A </s>")}, r"adds \['</s>'\]"),
        ({"added_tokens": [{"id": 1, "content": "<s>", "lstrip": True}]}, "'<s>' has lstrip"),
        ({"added_tokens": [{"id": 1, "content": "<s>", "rstrip": True}]}, "'<s>' has rstrip"),
        ({"added_tokens": [{"id": 1, "content": "<s>", "single_word": True}]}, "'<s>' has single_word"),
    ],
)
def test_a_json_that_is_malformed_or_not_supported_is_refused(tmp_path, changes, message):
    write_json(tmp_path / "tokenizer.json", json_definition(**changes))
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(tmp_path)


# Bad input


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", "a Git-LFS pointer"),
        (b"<html>not found</html>", "not a sentencepiece model|not valid JSON"),
        (b"\x00" * 64, "not a sentencepiece model|not valid JSON"),
        (b"[]", "not a sentencepiece model|expected a JSON object, got list"),
        (b"[" * 100_000, "not a sentencepiece model|not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, capfd, name, content, message):
    if name == "tokenizer_config.json":
        sentencepiece_folder(tmp_path)
        capfd.readouterr()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_model_file_cut_off_anywhere_is_refused(tmp_path):
    # A file that ends between two fields still parses: without this, it loads and loses spaces.
    path = sentencepiece_folder(tmp_path) / "tokenizer.model"
    whole = path.read_bytes()
    # The fields after the pieces are the last few hundred bytes.
    for size in [*range(0, len(whole) - 300, 29), *range(len(whole) - 300, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"tokenizer\.model"):
            Tokenizer.from_folder(tmp_path)


def test_a_folder_without_tokenizer_and_no_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer, expected tokenizer\.model or tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "absent")
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(InputError, match="expected a regular file"):
        Tokenizer.from_folder(tmp_path)


def test_the_config_is_optional_and_chat_template_jinja_wins_over_it(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the")[0] == tokenizer.bos_id == 1
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.chat_template) == (2, None, None)
    eos = {"__type": "AddedToken", "content": "<s>", "lstrip": False}
    templates = [{"name": "default", "template": "old"}]
    write_json(folder / "tokenizer_config.json", {"eos_token": eos, "chat_template": templates})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_id, tokenizer.chat_template) == (1, "old")
    (folder / "chat_template.jinja").write_text("new", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "new"
