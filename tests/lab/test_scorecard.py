"""What the scorecard measures: each figure against a case in which it is known."""

import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shapes import some_ids, tiny_model
from tests.text.tiny_tokenizers import sentencepiece_folder
from tinyllama.attention import eager, sdpa
from tinyllama.errors import InputError
from tinyllama.generation import generate
from tinyllama.lab.change import Change
from tinyllama.lab.clauses import breaks
from tinyllama.lab.continuation import can_cache, continuation, first_difference
from tinyllama.lab.effects import direct_changes, keys_needed, observe, relative_change, total_changes
from tinyllama.lab.figures import Extent
from tinyllama.lab.perplexity import BLOCK, FEWEST_BLOCKS, perplexity, text_nll
from tinyllama.lab.scorecard import Subject, scorecard
from tinyllama.lab.variants import ablate, topk, window
from tinyllama.text.tokenizer import Tokenizer

IDS = some_ids(1, 40)[0].tolist()
NARROW = partial(window, size=4)


def leak(q, k, v, context):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@breaks("cache")
def whole_texts_only(q, k, v, context):
    return sdpa(q, k, v, context)


# Changes


def test_a_change_is_undone_whatever_happens():
    model = tiny_model()
    model.set_attention(sdpa, layers=[2])
    before = [attention.kernel for attention in model.attentions]
    change = Change("narrow", NARROW, (0, 2), (1,))
    with change.applied(model):
        assert model.attentions[1].kernel is before[1]
        assert model.attentions[2].kernel.heads == (1,)
    assert [attention.kernel for attention in model.attentions] == before
    with pytest.raises(ZeroDivisionError), change.applied(model):
        raise ZeroDivisionError
    nowhere = Change("nowhere", NARROW, (4,))
    with pytest.raises(InputError, match="layers: expected 0 to 3, got 4"), nowhere.applied(model):
        pytest.fail("entered")
    assert [attention.kernel for attention in model.attentions] == before


def test_a_layer_is_in_a_change_that_names_it_or_none():
    assert 3 in Change("all", sdpa)
    assert 3 in Change("one", sdpa, (3,))
    assert 2 not in Change("one", sdpa, (3,))


# Perplexity and its interval


def nll(count, seed, scale=1.0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * scale


def test_perplexity_is_exp_of_the_mean_and_the_last_token_has_no_next_one():
    before, after = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([2.0, 2.0, torch.nan])
    result = perplexity([after], [before])
    assert result.before == pytest.approx(math.exp(1.5))
    assert result.after == pytest.approx(math.exp(2.0))
    assert result.ratio == pytest.approx(math.exp(0.5))
    assert result.low is None
    assert result.high is None


def test_texts_are_joined_token_by_token_not_text_by_text():
    result = perplexity([torch.ones(30), torch.zeros(10)], [torch.zeros(30), torch.zeros(10)])
    assert result.ratio == pytest.approx(math.exp(0.75))


@pytest.mark.parametrize("blocks", [FEWEST_BLOCKS - 1, FEWEST_BLOCKS])
def test_few_blocks_have_no_interval(blocks):
    before = nll(blocks * BLOCK, 0)
    assert (perplexity([before + 0.1], [before]).low is None) == (blocks < FEWEST_BLOCKS)


def test_the_same_change_everywhere_is_certain_and_no_change_is_one():
    before = nll(1000, 0)
    result = perplexity([before + 0.25], [before])
    assert result.low == pytest.approx(result.ratio, rel=1e-5) == pytest.approx(result.high, rel=1e-5)
    same = perplexity([before], [before])
    assert (same.ratio, same.low, same.high) == (1.0, 1.0, 1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 95% in theory; 88 to 99% are the 99.9% binomial bounds for 200 trials of 40 blocks (a percentile
    # bootstrap covers a little less than it says).
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        blocks = 0.1 * torch.randn(40, 1, generator=generator) + 0.05
        change = (blocks + torch.randn(40, BLOCK, generator=generator)).flatten()
        result = perplexity([change], [torch.zeros_like(change)])
        covered += result.low <= math.exp(0.05) <= result.high
    assert 176 <= covered <= 198


def test_the_interval_treats_a_block_of_tokens_as_one_observation():
    # Resampled token by token, an interval over constant blocks would be 8 times too narrow.
    blocks = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).expand(30, BLOCK).flatten()
    result = perplexity([blocks], [torch.zeros_like(blocks)])
    width = math.log(result.high / result.low)
    assert width == pytest.approx(2 * 1.96 * blocks[::BLOCK].std().item() / math.sqrt(30), rel=0.15)


@pytest.mark.usefixtures("no_grad")
def test_text_nll_reads_each_window_separately():
    model = tiny_model()
    result = text_nll(model, IDS, 16)
    assert result.shape == (39,)
    for start in (0, 16, 32):
        window_ids = torch.tensor([IDS[start : start + 17]])
        expected = torch.nn.functional.cross_entropy(
            model(window_ids[:, :-1])[0].double(), window_ids[0, 1:], reduction="none"
        )
        torch.testing.assert_close(result[start : start + 16], expected)


# What moved inside


@given(st.floats(0.01, 3.0))
@settings(max_examples=20)
def test_relative_change_is_the_share_of_the_length(share):
    before = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relative_change(before * (1 + share), before), torch.full((2,), share))


def test_relative_change_of_nothing_is_finite():
    zero = torch.zeros(3, 4)
    assert relative_change(zero, zero) == 0
    assert relative_change(zero + 1, zero) == 1


@pytest.mark.usefixtures("no_grad")
def test_a_change_shows_in_its_own_heads_first_and_in_everything_after_them():
    model = tiny_model()
    _, before = observe(model, IDS)
    change = Change("narrow", NARROW, (1,), (2, 5))
    with change.applied(model):
        _, values = observe(model, IDS)
    layers, heads = total_changes(values, before)
    assert layers.shape == (4,)
    assert heads.shape == (4, 8)
    assert layers[0] == 0
    assert (layers[1:] > 0).all()
    assert (heads[0] == 0).all()
    assert [head for head in range(8) if heads[1, head] > 0] == [2, 5]
    assert (heads[2:] > 0).all()


@pytest.mark.usefixtures("no_grad")
def test_a_heads_own_change_is_measured_on_the_unchanged_models_values():
    # In the first changed layer it equals the whole change; in later layers it excludes the earlier ones.
    model = tiny_model()
    _, before = observe(model, IDS)
    both = Change("both", NARROW, (1, 2))
    second = Change("second", NARROW, (2,), (3,))
    direct, alone, none = direct_changes(model, [both, second, Change("none", NARROW, ())], IDS)
    with Change("first", NARROW, (1,)).applied(model):
        _, values = observe(model, IDS)
    # Not to the bit: the values went through another kernel.
    torch.testing.assert_close(direct[1], total_changes(values, before)[1][1], rtol=1e-4, atol=1e-6)
    with Change("second", NARROW, (2,)).applied(model):
        _, values = observe(model, IDS)
    torch.testing.assert_close(direct[2], total_changes(values, before)[1][2], rtol=1e-4, atol=1e-6)
    assert (direct[[0, 3]] == 0).all()
    assert alone[2, 3] == direct[2, 3]
    assert alone.count_nonzero() == 1
    assert none.count_nonzero() == 0
    assert [attention.kernel for attention in model.attentions] == [eager] * 4


@pytest.mark.parametrize(
    ("kernel", "layers", "expected"),
    [
        (eager, None, 1.0),
        # Of 40 tokens: the second 20 see only the last 3 of the first 20.
        (NARROW, None, 3 / 20),
        (NARROW, (0, 1), (1 + 3 / 20) / 2),
        (ablate, None, 0.0),
    ],
)
def test_keys_that_no_later_token_reads_are_not_needed(kernel, layers, expected):
    model = tiny_model()
    with Change("x", kernel, layers).applied(model):
        assert keys_needed(model, IDS) == pytest.approx(expected)


def test_keys_that_some_later_token_reads_are_needed():
    # Top-1 reads one key a query: together, 20 queries and the 4 heads of a group read several.
    model = tiny_model()
    with Change("x", partial(topk, keys=1)).applied(model):
        assert 1 / 20 < keys_needed(model, IDS) < 1


def test_without_a_gradient_the_keys_needed_are_unknown():
    model = tiny_model()
    with Change("x", breaks("gradient")(eager)).applied(model):
        assert keys_needed(model, IDS) is None


# Continuations and speed


def test_a_kernel_without_a_cache_continues_by_whole_passes():
    model = tiny_model(attention="sdpa")
    cached = continuation(model, IDS, 8)
    assert cached == generate(model, [IDS], max_new_tokens=8)[0]
    with Change("x", whole_texts_only, (2,)).applied(model):
        assert not can_cache(model)
        assert continuation(model, IDS, 8) == cached
    assert can_cache(model)


def test_whole_passes_stop_at_the_end_of_text():
    model = tiny_model(attention="sdpa")
    first = continuation(model, IDS, 3)[1]
    ending = tiny_model(attention="sdpa", eos_token_id=first)
    expected = generate(ending, [IDS], max_new_tokens=8)[0]
    with Change("x", whole_texts_only).applied(ending):
        assert continuation(ending, IDS, 8) == expected
    assert len(expected) < 8


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([], [4], 0)],
)
def test_the_first_difference_may_be_the_end(one, other, expected):
    assert first_difference(one, other) == expected
    assert first_difference(other, one) == expected


# The whole card


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path_factory.mktemp("tokenizer")))
    texts = {"one": some_ids(1, 60, 290)[0].tolist(), "two": some_ids(1, 30, 290, seed=1)[0].tolist()}
    return Subject(
        tiny_model(attention="sdpa", vocab_size=300), tokenizer, texts, {"a cat": tokenizer.encode("a cat")}
    )


EXTENT = Extent(context=20, rounds=1, new_tokens=5)


@pytest.fixture(scope="module")
def card(subject):
    changes = [
        Change("own", sdpa),
        Change("leak", leak),
        Change("narrow", NARROW, (1, 2), (0,)),
        Change("whole", whole_texts_only, (0,)),
    ]
    return scorecard(subject, changes, EXTENT)


def test_the_unchanged_kernel_scores_no_change(card):
    results = card.changes[0].results
    assert results.all.ratio == 1.0
    assert results.all.before == results.all.after
    assert results.all.kl_max == 0.0
    assert results.all.top1 == 1.0
    assert not any(results.layers_changed)
    assert not any(map(any, results.heads_changed + results.heads_direct))
    assert (results.cache.of, results.cache.needed, results.cache.share) == (20, 1.0, 1.0)
    (row,) = results.continuations
    assert row.parts_at is None
    assert row.rest == ""
    assert row.ids == card.unchanged.continuations[0].ids


def test_a_leak_is_named_and_not_measured(card):
    leak = card.changes[1]
    assert not leak.passed
    assert {"causal", "cache"} <= {clause.name for clause in leak.contract if clause.verdict == "BROKEN"}
    assert leak.results is None


def test_texts_add_up_and_places_are_told(card):
    narrow = card.changes[2]
    one, two = narrow.results.texts
    assert (narrow.layers, narrow.heads) == ([1, 2], [0])
    assert (one.text, one.tokens, two.text, two.tokens) == ("one", 60, "two", 30)
    assert narrow.results.all.tokens == 90
    assert narrow.results.all.kl_mean == pytest.approx((60 * one.kl_mean + 30 * two.kl_mean) / 90)
    assert 0 < narrow.results.all.top1 < 1
    assert narrow.results.layers_changed[0] == 0 < narrow.results.layers_changed[1]
    assert [bool(sum(row)) for row in narrow.results.heads_direct] == [False, True, True, False]


@pytest.mark.usefixtures("no_grad")
def test_what_moved_is_the_mean_over_tokens_of_all_texts(card, subject):
    changed = Change("narrow", NARROW, (1, 2), (0,))
    expected = []
    for ids in subject.texts.values():
        _, before = observe(subject.model, ids)
        with changed.applied(subject.model):
            _, values = observe(subject.model, ids)
        (direct,) = direct_changes(subject.model, [changed], ids)
        expected.append((*total_changes(values, before), direct))
    results = card.changes[2].results
    for key, one, two in zip(("layers_changed", "heads_changed", "heads_direct"), *expected, strict=True):
        assert not torch.allclose(one, two)
        torch.testing.assert_close(torch.tensor(getattr(results, key)), (60 * one + 30 * two) / 90)


@pytest.mark.usefixtures("no_grad")
def test_perplexity_and_kl_are_those_of_the_two_models(card, subject):
    model, ids = subject.model, subject.texts["one"]
    before = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    with Change("narrow", NARROW, (1, 2), (0,)).applied(model):
        after = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    row = card.changes[2].results.texts[0]
    following = torch.tensor(ids[1:])[:, None]
    assert row.after == pytest.approx(math.exp(-after[:-1].gather(1, following).mean()), rel=1e-6)
    kl = (before.exp() * (before - after)).sum(dim=-1).mean().item()
    assert row.kl_mean == pytest.approx(kl, rel=1e-5)


def test_a_kernel_without_a_cache_has_no_decode_speed(card):
    speed = card.changes[3].results.speed
    assert (speed.decode, speed.decode_ratio) == (None, None)
    assert speed.prefill_ratio > 0
    assert card.unchanged.speed.prefill_ratio == 1.0


def test_the_continuation_is_cut_where_it_parts(subject):
    # This continuation differs at once. Texts are decoded together with their prompt.
    brief = Extent(context=20, rounds=0, new_tokens=5)
    card = scorecard(subject, [Change("none", ablate)], brief)
    (mine,), (own,) = card.changes[0].results.continuations, card.unchanged.continuations
    place = mine.parts_at
    assert mine.ids[:place] == own.ids[:place]
    assert mine.ids[place] != own.ids[place]
    decode, prompt = subject.tokenizer.decode, subject.prompts["a cat"]
    start = len(decode(prompt))
    assert mine.same == decode([*prompt, *mine.ids[:place]])[start:].rstrip("\ufffd")
    assert mine.same + mine.rest == decode([*prompt, *mine.ids])[start:]
    assert card.unchanged.speed is card.changes[0].results.speed is None
    assert [attention.kernel for attention in subject.model.attentions] == [sdpa] * 4


def test_the_contract_is_checked_in_a_layer_that_is_changed_and_infinite_logits_are_refused(subject):
    def overflowing(q, k, v, context):
        assert context.layer >= 2
        return sdpa(q, k, v, context) * (torch.inf if q.shape[2] == 60 else 1)

    with pytest.raises(InputError, match="overflowing: gives logits on one that are not finite"):
        scorecard(subject, [Change("overflowing", overflowing, (3, 2))], EXTENT)


def test_the_figures_are_plain_json(card):
    figures = dataclasses.asdict(card)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
