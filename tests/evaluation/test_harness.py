"""The adapter answers as lm-evaluation-harness's own class for transformers' models does, to the bit.

`HFLM` asks transformers' model of the same weights, in float32, with eager attention, one text at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import tinyllama
from tests.shapes import tiny_model
from tests.text.tiny_tokenizers import adds, json_definition, write_json
from tinyllama.checkpoints.load import load_model
from tinyllama.errors import InputError
from tinyllama.evaluation.harness import HarnessModel
from tinyllama.evaluation.paired import run
from tinyllama.evaluation.tasks import loaded, toys
from tinyllama.parity.reference import reference_model
from tinyllama.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTEXT = 48
STORY = "The cat sat on the mat. Then the cat"

PAIRS = {
    "empty context": ("", "a b"),
    "empty context, and a continuation that begins with BOS": ("", "<s>a b"),
    "one token": ("a b", " a"),
    "the same input, another last token": ("a b", " b"),
    "one token of an empty context": ("", "a"),
    "spaces that end a context": ("ab ab  ", "ab"),
    "a newline that ends a context": ("ab\n", "ab"),
    "a token across the border": ("a a", "b ab"),
    "characters of several bytes": ("é 👍", "é👍 ü"),
    "special tokens in the text": ("a </s> b", " a</s>"),
    "a context that begins with BOS": ("<s>a b", " ab"),
    "a context as long as the model's": ("a b " * (CONTEXT // 2 - 2), "ab"),
    "a context longer than the model's": ("a b ab " * 40, "ab é"),
    "a continuation as long as the model's": ("a b", "é" * (CONTEXT // 2 - 1)),
}
TEXTS = ["", "a", "a b ab", "é👍", "<s>a b", "a </s>", " a b ", "a b é " * 11, "ab a é👍 " * 40]
PROMPTS = ["a", "a b ", "é👍", "<s>a", "a </s> b", "a b ab " * 12 + "b ab é a a ab b b ab a ab"]


class Both(NamedTuple):
    """Our adapter and the harness's, over the same weights."""

    ours: HarnessModel
    theirs: HFLM


def both(model, folder) -> Both:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs = HFLM(pretrained=reference_model(model, "eager"), tokenizer=tokenizer, batch_size=1)
    return Both(HarnessModel(model, Tokenizer.from_folder(folder)), theirs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Both:
    """A tiny model of 48 positions, with a tokenizer that begins texts with BOS, like Llama's."""
    folder = tmp_path_factory.mktemp("tiny")
    write_json(folder / "tokenizer.json", json_definition(post_processor=adds("<s> $A")))
    write_json(folder / "tokenizer_config.json", NAMES)
    model = tiny_model(seed=2, vocab_size=266, max_position_embeddings=CONTEXT, eos_token_id=2)
    # It writes no bytes: transformers shows other marks for bytes that are no characters.
    model.lm_head.weight.data[3:259] = 0
    return both(model, folder)


@pytest.fixture(scope="module")
def trained(smollm2_folder) -> Both:
    """SmolLM2, whose tokenizer begins no text with BOS."""
    return both(load_model(smollm2_folder, device="cpu", dtype="float32", attention="eager"), smollm2_folder)


def ask(lm, method, *arguments):
    requests = [Instance(method, {}, argument, 0) for argument in arguments]
    return getattr(lm, method)(requests)


def assert_same(pair: Both, method, *arguments):
    assert ask(pair.ours, method, *arguments) == ask(pair.theirs, method, *arguments)


# Likelihoods of continuations


@pytest.mark.parametrize("kind", PAIRS)
def test_a_log_likelihood_is_the_same_float(tiny, kind):
    assert_same(tiny, "loglikelihood", PAIRS[kind])


def test_many_at_once_come_back_in_their_order(tiny):
    assert_same(tiny, "loglikelihood", *PAIRS.values())


words = st.lists(st.sampled_from(["a", "b", "ab", " ", "  ", "\n", "é", "👍", "<s>", "</s>", "a b " * 20]))


@settings(max_examples=60)
@given(
    context=words, first=st.sampled_from(["a", " b", "é"]), rest=st.lists(st.sampled_from(["a", " ", "é"]))
)
def test_any_texts_give_the_same_float(tiny, context, first, rest):
    assert_same(tiny, "loglikelihood", ("".join(context), first + "".join(rest[:9])))


def test_a_trained_model_gives_the_same_floats_and_some_continuations_are_greedy(trained):
    pairs = [
        ("The capital of France is", " Paris"),
        ("The capital of France is ", "Paris"),
        ("The capital of France is", " Rome"),
        ("", "Hello"),
        ("", "<|im_start|>user"),
        ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant"),
        ("naïve 👩‍🚀", " 日本"),
    ]
    assert_same(trained, "loglikelihood", *pairs)
    greedy = [answer[1] for answer in ask(trained.ours, "loglikelihood", *pairs)]
    assert any(greedy)
    assert not all(greedy)


def test_a_context_of_spaces_alone_stands_for_an_empty_one(trained):
    # HFLM stops with an assertion where the tokenizer adds no BOS.
    assert ask(trained.ours, "loglikelihood", ("  ", "a")) == ask(trained.ours, "loglikelihood", ("", "  a"))


@pytest.mark.parametrize(("pair", "got"), [(("a", ""), "got 0"), (("a", "é" * CONTEXT), "got 96")])
def test_a_continuation_without_tokens_or_with_too_many_is_refused(tiny, pair, got):
    with pytest.raises(InputError, match=f"expected 1 to {CONTEXT} tokens, {got}"):
        ask(tiny.ours, "loglikelihood", pair)


def test_a_model_that_gives_nan_has_no_likelihoods(tiny):
    with tinyllama.patch(tiny.ours.model, {"norm": lambda x: x * torch.nan}):
        for method, asked in {"loglikelihood": ("a", "b"), "loglikelihood_rolling": ("a b",)}.items():
            with pytest.raises(tinyllama.NonFiniteLogitsError, match="NaN"):
                ask(tiny.ours, method, asked)


# Rolling likelihoods


@pytest.mark.parametrize("text", TEXTS)
def test_the_likelihood_of_a_text_is_the_same_float(tiny, text):
    assert_same(tiny, "loglikelihood_rolling", (text,))


def test_several_texts_keep_their_windows(tiny, trained):
    assert_same(tiny, "loglikelihood_rolling", *[(text,) for text in TEXTS])
    assert_same(trained, "loglikelihood_rolling", (STORY,), ("",), ("naïve 👩‍🚀\n<|im_end|>",))


# Generation

STOPS = [
    {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    {"until": [], "max_gen_toks": 12},
    {"until": "b", "max_new_tokens": 20, "temperature": 0.0},
    {"until": ["é", "a b", "ab"], "max_gen_toks": 24},
    {"until": ["\n"], "max_gen_toks": 8, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("given", STOPS, ids=str)
def test_a_generated_text_is_the_same(tiny, given):
    asked = [(prompt, given) for prompt in PROMPTS]
    assert_same(tiny, "generate_until", *asked)
    if "b" not in given["until"]:
        assert len(set(ask(tiny.ours, "generate_until", *asked))) > 3  # so this compared something


def test_a_trained_model_stops_where_it_should(trained):
    asked = [
        ("Question: What is the opposite of hot?\nAnswer:", {"until": ["\n"], "max_gen_toks": 3}),
        (STORY, {"until": ["mat", "dog"], "max_gen_toks": 6}),
        ("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n", {"until": [], "max_gen_toks": 3}),
    ]
    assert_same(trained, "generate_until", *asked)
    texts = ask(trained.ours, "generate_until", *asked)
    assert not any("\n" in text or "mat" in text for text in texts[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"until": [], "max_gen_toks": CONTEXT}, f"less than the model's {CONTEXT} tokens, got {CONTEXT}"),
        ({"until": [], "num_beams": 2}, "got num_beams"),
        ({"until": [], "do_sample": True}, "needs a temperature above 0"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(tiny, given, message):
    with pytest.raises(InputError, match=message):
        ask(tiny.ours, "generate_until", ("a", given))


@pytest.mark.parametrize("more", [{}, {"top_p": 0.8, "top_k": 0}], ids=str)
def test_a_seed_draws_the_same_text(trained, more):
    # So hot that most draws are outside of the 50 likeliest tokens, which transformers keeps unasked.
    given = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 5.0, **more}
    fresh = HarnessModel(trained.ours.model, trained.ours.tokenizer)  # its first seed is 0
    torch.manual_seed(0)
    theirs = ask(trained.theirs, "generate_until", (STORY, given))
    assert ask(fresh, "generate_until", (STORY, given)) == theirs


def test_samples_of_one_prompt_differ_and_come_again(tiny):
    given = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}

    def texts():
        model = HarnessModel(tiny.ours.model, tiny.ours.tokenizer)
        return ask(model, "generate_until", ("a", given), ("a", given))

    first, second = texts()
    assert first != second
    assert texts() == [first, second]


# Whole tasks


@pytest.mark.parametrize("name", toys())
def test_a_toy_task_gets_the_same_answers_and_scores(trained, name):
    with loaded([name], fewshot=1) as tasks:
        ours, theirs = (run(lm, tasks, limit=2) for lm in trained)
    assert [one["resps"] for one in ours["samples"][name]] == [
        one["resps"] for one in theirs["samples"][name]
    ]
    assert ours["results"] == theirs["results"]


# Chats

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi \n"}],
    [{"role": role, "content": role} for role in ("user", "assistant", "user")],
]


@pytest.mark.parametrize("chat", CHATS, ids=len)
@pytest.mark.parametrize("begun", [None, "The answer is", "The answer is ", " so"])
def test_a_chat_is_the_same_text_and_has_the_same_ids(trained, chat, begun):
    messages = chat if begun is None else [*chat, {"role": "assistant", "content": begun}]
    text = trained.ours.apply_chat_template(messages, begun is None)
    assert text == trained.theirs.apply_chat_template(messages, begun is None)
    assert trained.ours.tok_encode(text) == trained.theirs.tok_encode(text)
    assert begun is None or text.endswith(begun)


def test_a_template_that_refuses_a_system_message_gets_none(trained, monkeypatch, capsys):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.content | trim }}]{% endfor %}"
    )
    for lm in trained:
        monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    assert (
        trained.ours.apply_chat_template(CHATS[1]) == "[Hi]" == trained.theirs.apply_chat_template(CHATS[1])
    )
    assert capsys.readouterr().err.startswith("warning: ")
    begun = [*CHATS[0], {"role": "assistant", "content": "It is "}]
    assert trained.ours.apply_chat_template(begun, False) == trained.theirs.apply_chat_template(begun, False)


# Batches


def test_batches_give_the_same_but_for_rounding(tiny):
    batched = HarnessModel(tiny.ours.model, tiny.ours.tokenizer, batch=4)
    for method, asked in {
        "loglikelihood": list(PAIRS.values()),
        "loglikelihood_rolling": [(text,) for text in TEXTS],
    }.items():
        single, several = ask(tiny.ours, method, *asked), ask(batched, method, *asked)
        if method == "loglikelihood":
            assert [answer[1] for answer in single] == [answer[1] for answer in several]
            single, several = ([answer[0] for answer in answers] for answers in (single, several))
        assert several == pytest.approx(single, abs=1e-4, rel=1e-5)
        assert several != single  # they are other sums, so this compared something
    asked = [(prompt, given) for prompt in PROMPTS for given in STOPS[:2]]
    assert ask(batched, "generate_until", *asked) == ask(tiny.ours, "generate_until", *asked)


def test_the_longest_texts_come_first(tiny, monkeypatch):
    lengths = []
    model = tiny.ours.model
    whole = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda ids, **more: lengths.append(ids.shape[1]) or whole(ids, **more)
    )
    ask(tiny.ours, "loglikelihood", ("a", "b"), ("a b ab", "é"), ("a b", " a"), ("a b", " b"))
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 3  # the last two have the same input
