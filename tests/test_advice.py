"""What a newcomer types first is accepted where its meaning is plain; else one line shows the call."""

import copy

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.advice import did_you_mean
from tinyllama.errors import InputError
from tinyllama.generation import generate, stream
from tinyllama.kernels import kernel_name
from tinyllama.lab.kernel_file import VARIANTS

IDS = [5, 7, 11]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (IDS, r"got list; write model\(torch.tensor\(\[ids\]\)\)"),
        ("Hi", "got str"),
        (torch.tensor(IDS), r"got Tensor \[3\]; write model\(ids\[None\]\)"),
        (torch.tensor([[IDS]]), r"got Tensor \[1, 1, 3\]"),
    ],
)
def test_a_model_says_what_ids_it_takes(ids, expected):
    with pytest.raises(
        InputError, match=rf"^ids: expected a tensor of rows and tokens, \(B, T\), {expected}"
    ):
        tiny_model()(ids)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (IDS, r"write \(new_ids,\) = generate\(model, \[ids\]\)"),
        (torch.tensor(IDS), r"write \(new_ids,\) = generate\(model, \[ids\]\)"),
        ("Hi", r"got a text; write generate\(model, \[tokenizer.encode\(text\)\]\)"),
        (["Hi", "Ho"], "got a text"),
    ],
)
def test_generate_says_what_prompts_it_takes(prompts, expected):
    with pytest.raises(InputError, match=f"^prompts: .*{expected}"):
        generate(tiny_model(), prompts)


@pytest.mark.parametrize(
    ("ids", "expected"), [("Hi", "got a text"), ([IDS], "got several"), (torch.tensor([IDS]), "got several")]
)
def test_a_stream_says_that_it_takes_one_prompt(ids, expected):
    with pytest.raises(InputError, match=f"^ids: .*{expected}; write stream"):
        stream(tiny_model(), ids)


def test_ids_may_be_tensors():
    model, ids = tiny_model(), some_ids(2, 5)
    settings = {"max_new_tokens": 4, "eos_ids": ()}
    rows = generate(model, ids, **settings)
    assert rows == generate(model, ids.tolist(), **settings)
    assert list(stream(model, ids[0], **settings)) == rows[0]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("do_sample", "temperature=0.7 samples"),
        ("eos_token_id", "eos_ids="),
        ("temprature", "did you mean 'temperature'"),
    ],
)
def test_an_unknown_setting_is_told_the_known_ones(setting, expected):
    with pytest.raises(InputError, match=f"^generate: expected settings .*, got {setting!r}; {expected}"):
        generate(tiny_model(), [IDS], **{setting: 1})


def test_names_of_transformers_are_told_what_they_are_here(smollm2):
    model = tiny_model()
    with pytest.raises(InputError, match=r"^Llama: has no generate, .*tinyllama.generate\(model, \[ids\]"):
        model.generate(IDS, do_sample=True)
    with pytest.raises(InputError, match=r"^tokenizer: is not called, expected .*tokenizer.encode\(text\)"):
        smollm2("Hi", return_tensors="pt")
    with pytest.raises(InputError, match=r"^Tokenizer: has no apply_chat_template, .*tokenizer.chat\(\["):
        smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
    with pytest.raises(InputError, match=r"decode one: decode\(rows\[0\]\)"):
        smollm2.decode([IDS])
    for thing in (model, smollm2):  # to other code they are absent
        assert not hasattr(thing, "generate")
        assert not hasattr(thing, "apply_chat_template")
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = thing.nothing
    assert copy.deepcopy(model).layers[0] is not model.layers[0]


def test_a_kernel_and_its_places_may_be_written_as_on_a_command_line():
    model = tiny_model()
    model.set_attention("window:size=8", layers="1-2")
    assert [kernel_name(one.kernel) for one in model.attentions[:3]] == ["eager", *["window(size=8)"] * 2]
    model.set_attention("sinks", layers=3)
    assert model.attentions[3].kernel is VARIANTS["sinks"]


@pytest.mark.parametrize(
    ("kernel", "places", "expected"),
    [
        ("windw", {}, "attention: expected eager, .*got 'windw'; did you mean 'window'?"),
        (None, {}, r"attention: expected a function .*got NoneType"),
        (dict, {}, r"attention: expected a function .*got the class dict"),
        ("window", {"layers": "8-21"}, "layers: expected 0 to 3, got 8"),
        ("window", {"layers": "all"}, "layers: expected numbers such as 0-3,7, got 'all'"),
        ("window", {"heads": 8}, "heads: expected 0 to 7, got 8"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_at_once(kernel, places, expected):
    model = tiny_model()
    with pytest.raises(InputError, match=f"^{expected}"):
        model.set_attention(kernel, **places)
    assert {one.kernel for one in model.attentions} == {tiny_model().attentions[0].kernel}


def test_the_nearest_name_is_found_whatever_its_case():
    assert did_you_mean("SmolLM", ["smollm2", "window"]) == "; did you mean 'smollm2'?"
    assert did_you_mean("quite another", ["smollm2", "window"]) == ""
