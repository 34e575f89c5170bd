"""Guessing changes how many passes a text takes, and nothing about the text."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tinyllama
from tests.scripts.test_scripts import load_script
from tests.shapes import some_ids, tiny_model
from tests.test_generation import Letters
from tinyllama import speculation
from tinyllama.cli import options, terminal
from tinyllama.errors import InputError
from tinyllama.generation import generate, stream
from tinyllama.parity.continuations import SETTINGS
from tinyllama.sampler import NonFiniteLogitsError, Sampler
from tinyllama.speculation import Speculation, draft
from tinyllama.text.conversation import Conversation
from tinyllama.text.reply import TextReply

PROMPT = some_ids(1, 7, seed=7)[0].tolist()
ROUNDS = [9, 4, 7, 9, 4, 7, 9, 4]  # its last ids occurred before: there is a guess at the first pass
FREE = {"max_new_tokens": 40, "eos_ids": ()}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    # float64, where rounding decides nothing: passes of several tokens may round unlike passes of one.
    return tiny_model(dtype=torch.float64)


@pytest.fixture
def guess_from(monkeypatch):
    """Lets the guesses be what a text will say, each with a chance to be wrong; returns what was asked."""
    asked = []

    def patch(truth, wrong=0.0, seed=0):
        chance = random.Random(seed)

        def guesses(ids, most):
            asked.append((len(ids), most))
            right = truth[len(ids) : len(ids) + most]
            return [id if chance.random() >= wrong else (id + 1) % 320 for id in right]

        monkeypatch.setattr(speculation, "draft", guesses)
        asked.clear()
        return asked

    return patch


# --- the guess -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("the cat saw the", 4, " cat"),
        ("abc1 abc2 abc", 1, "2"),  # the latest place
        ("abcX-bcY-abc", 1, "X"),  # a longer ending before a later place
        ("abX-cb-ab", 2, "X-"),
        ("aX-ba", 2, ""),  # one id alone is too little
        ("aaa", 3, "a"),  # the places may overlap
        ("abcd", 3, ""),
        ("ababab", 0, ""),
        ("ab", 3, ""),
        ("a", 3, ""),
        ("", 3, ""),
    ],
)
def test_a_guess_is_what_followed_the_same_ending(text, most, expected):
    assert "".join(map(chr, draft([ord(c) for c in text], most))) == expected


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 9))
def test_a_guess_continues_the_best_place_there_is(ids, most):
    def same(end):
        return next((n for n in range(3) if n == end or ids[end - 1 - n] != ids[-1 - n]), 3)

    places = [(same(end), end) for end in range(1, len(ids)) if same(end) >= 2]
    end = max(places)[1] if places else len(ids)
    assert draft(ids, most) == ids[end : end + most]


# --- the same ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_ids_are_those_without_guessing(attention):
    model = tiny_model(dtype=torch.float64, attention=attention)
    drafted = accepted = 0
    for seed in range(12):
        # Few different ids, and some prompts that repeat themselves.
        prompt = some_ids(1, 5 + 2 * seed, vocab_size=6, seed=seed)[0].tolist() * (1 + seed % 3)
        tokens = stream(model, prompt, speculate=1 + seed % 7, **FREE)
        assert [list(tokens)] == generate(model, [prompt], **FREE), seed
        drafted += tokens.speculation.drafted
        accepted += tokens.speculation.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}, *SETTINGS])
def test_no_guess_right_or_wrong_changes_an_id(model, guess_from, settings, seed):
    (plain,) = generate(model, [PROMPT], seed=seed, **settings, **FREE)
    for wrong, most in product((0.0, 0.2, 1.0), (1, 3, 6)):
        guess_from(PROMPT + plain, wrong, seed)
        tokens = stream(model, PROMPT, seed=seed, speculate=most, **settings, **FREE)
        assert list(tokens) == plain
        done = tokens.speculation
        # After the first id each pass gives its right guesses and one id more, unless the limit is before it.
        assert done.passes + done.accepted in (39, 40)
        if wrong == 0:
            assert done.accepted == done.drafted
            assert done.passes == math.ceil(39 / (most + 1))
        if wrong == 1:
            assert (done.passes, done.accepted) == (39, 0)


def test_a_seed_repeats_with_guesses(model):
    settings = {"temperature": 1.0, "speculate": 4, **FREE}
    first, second, other = (generate(model, [ROUNDS], seed=seed, **settings) for seed in (1, 1, 2))
    assert first == second != other


def test_draws_follow_the_distribution_after_right_and_wrong_guesses(monkeypatch):
    # Independent of decoding without guesses: three ids whose joint distribution is known, from a model that
    # looks at the last id alone. The guess [2, 4] is likely, but not certain, and 4 after 2 as well.
    table = torch.tensor([[0.1 * ((3 * row + 5 * id) % 8) * (id + 1) for id in range(6)] for row in range(6)])
    sampler = Sampler(temperature=0.8, top_k=4, top_p=0.9)
    monkeypatch.setattr(speculation, "draft", lambda ids, most: [2, 4][:most])
    generator, cache = torch.Generator().manual_seed(0), tiny_model().new_cache(1, 8)
    counts, right = Counter(), 0
    for _ in range(4000):
        guessing = Speculation(2)
        steps = guessing.steps(
            lambda ids, *_: table[ids], [1], table[[1]], lambda row: sampler.choose(row, generator), cache
        )
        counts[tuple(next(steps)[0] for _ in range(3))] += 1
        right += guessing.accepted
    assert right > 500
    p = sampler.probabilities(table)
    expected = {
        (a, b, c): 4000 * float(p[1, a] * p[a, b] * p[b, c]) for a, b, c in product(range(6), repeat=3)
    }
    possible = {ids: count for ids, count in expected.items() if count}
    assert counts.keys() <= possible.keys()
    statistic = sum((counts[ids] - count) ** 2 / count for ids, count in possible.items())
    # The 99th percentile of chi-squared, by Wilson and Hilferty. The seed is fixed: passes or fails for good.
    freedom = len(possible) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 2.33 * (2 / (9 * freedom)) ** 0.5) ** 3


# --- where a text ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", range(1, 12))
def test_eos_ends_a_text_inside_a_run_of_right_guesses(model, guess_from, end):
    settings = {"temperature": 1.0, "seed": 5}
    (free,) = generate(model, [PROMPT], **settings, **FREE)
    guess_from(PROMPT + free)
    expected = free[: free.index(free[end]) + 1]
    tokens = stream(model, PROMPT, eos_ids=[free[end]], speculate=4, **settings)
    assert list(tokens) == expected
    assert tokens.reason == "eos"
    assert generate(model, [PROMPT], eos_ids=[free[end]], speculate=4, **settings) == [expected]


@pytest.mark.parametrize("limit", range(13))
def test_a_text_ends_at_its_limit_and_no_guess_leaves_the_cache(model, guess_from, limit):
    (free,) = generate(model, [PROMPT], **FREE)
    asked = guess_from(PROMPT + free)
    cache = model.new_cache(1, len(PROMPT) + limit)
    settings = {"max_new_tokens": limit, "eos_ids": (), "speculate": 4}
    tokens = stream(model, PROMPT, cache=cache, **settings)
    assert list(tokens) == free[:limit]
    assert tokens.reason == "length"
    assert len(tokens.seconds) == limit
    assert all(length + most <= cache.capacity for length, most in asked)
    assert not cache.keys[..., 0, :].any()  # padding's slot
    assert generate(model, [PROMPT], **settings) == [free[:limit]]


def test_a_full_context_ends_a_text_inside_a_run_of_right_guesses(guess_from):
    model = tiny_model(dtype=torch.float64, max_position_embeddings=24)
    (free,) = generate(model, [PROMPT], **FREE)
    guess_from(PROMPT + free)
    tokens = stream(model, PROMPT, speculate=5, **FREE)
    assert list(tokens) == free
    assert (len(free), tokens.reason) == (17, "length")


def test_a_stop_string_inside_a_run_of_right_guesses_ends_the_text(model, guess_from):
    (free,) = generate(model, [PROMPT], temperature=1.0, seed=5, **FREE)
    text = "".join(map(chr, free))
    guess_from(PROMPT + free)
    for at in range(8):
        tokens = stream(model, PROMPT, temperature=1.0, seed=5, speculate=6, **FREE)
        reply = TextReply(tokens, Letters(), PROMPT, [text[at : at + 3]])
        assert "".join(reply) == text[: text.index(text[at : at + 3])]
        assert reply.reason == "stop"


def test_nan_stops_the_stream_after_the_ids_so_far(model, guess_from):
    model = tiny_model()
    (free,) = generate(model, [PROMPT], **FREE)
    guess_from(PROMPT + free)
    tokens = stream(model, PROMPT, speculate=2, **FREE)
    got = [next(tokens) for _ in range(4)]  # the prefill's, and those of one pass
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError):
        next(tokens)
    assert got == free[:4]


# --- the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_wrong_guesses_left_in_the_cache_is_never_read(guess_from, attention):
    model = tiny_model(dtype=torch.float64, attention=attention)
    (free,) = generate(model, [PROMPT], **FREE)
    guess_from(PROMPT + free, wrong=0.3)
    cache = model.new_cache(1, 64)

    def poison(module, args):
        for kept in (cache.keys, cache.values):
            # Slots from the first token of this pass on: all that wrong guesses may have written.
            kept[..., 1 + cache.length :, :] = float("nan")

    hook = model.register_forward_pre_hook(poison)
    tokens = stream(model, PROMPT, cache=cache, speculate=5, **FREE)
    assert list(tokens) == free
    hook.remove()
    assert 0 < tokens.speculation.accepted < tokens.speculation.drafted


def test_a_cache_that_holds_the_start_is_used(model, guess_from):
    (free,) = generate(model, [PROMPT], **FREE)
    guess_from(PROMPT + free, wrong=0.3)
    cache = model.new_cache(1, 64)
    tokens = stream(model, PROMPT, cache=cache, speculate=5, **FREE)
    first = [next(tokens) for _ in range(11)]
    # All but the newest id have been through the model, whatever else the run would have given.
    cache.length = len(PROMPT) + 10
    later = stream(model, PROMPT + first, cache=cache, speculate=5, **FREE)
    assert first + list(later) == generate(model, [PROMPT], max_new_tokens=51, eos_ids=())[0]


def test_turns_of_a_conversation_are_those_without_guesses(smollm2_folder, guess_from):
    tokenizer = tinyllama.Tokenizer.from_folder(smollm2_folder)
    model = tiny_model(dtype=torch.float64, vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    conversation = Conversation(model, tokenizer)

    def ask(text, show=lambda piece: None):
        ids = tokenizer.chat([*conversation.messages, {"role": "user", "content": text}])
        (new_ids,) = generate(model, [ids], max_new_tokens=20)
        guess_from(ids + new_ids, wrong=0.3)
        reply = conversation.ask(text, show, max_new_tokens=20, speculate=4)
        assert reply == tokenizer.decode(new_ids, skip_special=True)
        assert 0 < conversation.last.speculation.accepted < conversation.last.speculation.drafted

    def interrupt(piece):
        shown.append(piece)
        if len(shown) == 7:
            raise KeyboardInterrupt

    shown = []
    ask("Name a colour.")
    ask("Another one?")
    assert conversation.last.cached > 20
    with pytest.raises(KeyboardInterrupt):
        ask("Tell me a story.", interrupt)
    ask("Go on.")
    assert conversation.last.cached > 50


# --- the interface ---------------------------------------------------------------------------------------


def test_without_guesses_each_pass_is_one_token(model):
    widths = []
    hook = model.embed_tokens.register_forward_hook(lambda _, ids, __: widths.append(ids[0].shape[1]))
    tokens = stream(model, ROUNDS, **FREE)
    assert len(list(tokens)) == 40
    hook.remove()
    assert widths == [8] + [1] * 39
    assert tokens.speculation is None


def test_generate_guesses_too(model, guess_from):
    (free,) = generate(model, [PROMPT], **FREE)
    guess_from(PROMPT + free)
    widths = []
    hook = model.embed_tokens.register_forward_hook(lambda _, ids, __: widths.append(ids[0].shape[1]))
    assert generate(model, [PROMPT], speculate=3, **FREE) == [free]
    hook.remove()
    assert widths == [7] + [4] * 10


def test_a_pass_counts_for_its_first_id_in_the_times(model, guess_from):
    (free,) = generate(model, [PROMPT], **FREE)
    guess_from(PROMPT + free)
    tokens = stream(model, PROMPT, speculate=3, **FREE)
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(len(tokens.seconds)))
    list(tokens)
    hook.remove()
    assert passes == list(range(1, 40, 4))
    assert len(tokens.seconds) == 40


def test_what_cannot_be_guessed_is_refused_at_once(model):
    with pytest.raises(InputError, match=r"speculate: expected 0 \(off\) or a positive integer, got -1"):
        stream(model, PROMPT, speculate=-1)
    with pytest.raises(InputError, match="got 0"):
        Speculation(0)
    with pytest.raises(InputError, match=r"speculate: expected 0 \(off\) or one prompt, got 2 prompts"):
        generate(model, [PROMPT, PROMPT], speculate=3)
    recorded = tiny_model()
    recorded.step = lambda ids, cache, positions: recorded(ids, cache, positions)
    with pytest.raises(InputError, match="speculate: a recorded step has one token"):
        stream(recorded, PROMPT, speculate=3)


def test_the_scripts_say_the_same_with_guesses_and_count_them(smollm2_folder, monkeypatch, capfd):
    loaded = tinyllama.load(str(smollm2_folder))
    monkeypatch.setattr(options, "load", lambda *args: loaded)
    monkeypatch.setattr(terminal, "piped", lambda: False)

    def run(*more):
        words = "Repeat this sentence: The lighthouse on Skerry Point was built by Alan and David Reid."
        settings = ["--max-new-tokens", "20", "--chat", "--stats"]
        monkeypatch.setattr(sys, "argv", ["generate.py", words, *settings, *more])
        assert load_script("generate").main() == 0
        out, err = capfd.readouterr()
        return out, dict(line.split(maxsplit=1) for line in err.splitlines())

    plain, stats = run()
    assert "guesses" not in stats
    out, stats = run("--speculate", "4")
    assert out == plain
    right, _, guessed, *words = stats["guesses"].split()
    assert 8 < int(right) < int(guessed)
    assert words[:3] == ["guessed", "tokens", "were"]
    assert float(words[-2]) > 2

    conversation = Conversation(*loaded)
    conversation.ask("Say yes.", lambda piece: None, max_new_tokens=3, speculate=2)
    load_script("chat").show_stats(conversation)
    assert "\nguesses  " in capfd.readouterr().err
