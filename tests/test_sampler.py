"""The sampler: each rule against its definition and transformers' own, and the draw against statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinyllama.errors import InputError
from tinyllama.sampler import NonFiniteLogitsError, Sampler, repetition_penalty, top_k, top_p

CPU = torch.device("cpu")
# Halves make ties common, where implementations differ.
logits = st.lists(st.integers(-20, 20).map(lambda n: n / 2), min_size=1, max_size=40).map(
    lambda row: torch.tensor([row])
)


def kept(filtered):
    return filtered.isfinite().nonzero()[:, 1].tolist()


def test_top_p_keeps_the_smallest_set_with_the_mass():
    row = torch.tensor([[0.5, 0.4, 0.1, 0.0]]).log()
    assert kept(top_p(row, 0.5)) == [0]
    assert kept(top_p(row, 0.6)) == [0, 1]
    assert kept(top_p(row, 0.95)) == [0, 1, 2]
    assert kept(top_p(row, 1e-9)) == [0]
    assert torch.equal(top_p(row, 1.0), row)


@given(logits, st.floats(0.01, 0.99))
def test_top_p_is_never_empty_has_the_mass_and_needs_every_token(row, p):
    probabilities = row.double().softmax(-1)[0]
    chosen = kept(top_p(row, p))
    mass = probabilities[chosen].sum().item()
    assert chosen
    assert mass >= p - 1e-6
    assert mass - probabilities[chosen].min().item() < p + 1e-6
    assert probabilities[chosen].min() >= max(
        (probabilities[i] for i in range(len(probabilities)) if i not in chosen), default=torch.tensor(0.0)
    )


@given(logits, st.floats(0.01, 1.0, exclude_max=True))
def test_top_p_is_transformers_ties_included(row, p):
    assert torch.equal(top_p(row, p), TopPLogitsWarper(p)(None, row))


@given(logits, st.integers(1, 50))
def test_top_k_is_transformers_ties_included(row, k):
    assert torch.equal(top_k(row, k), TopKLogitsWarper(k)(None, row))
    assert torch.equal(top_k(row, 0), row)


@given(logits, st.floats(0.5, 2.0), st.data())
def test_repetition_penalty_is_transformers(row, penalty, data):
    ids = data.draw(st.lists(st.integers(0, row.shape[1] - 1), min_size=1))
    seen = torch.zeros_like(row, dtype=torch.bool)
    seen[0, ids] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), row.clone())
    assert torch.equal(repetition_penalty(row, seen, penalty), expected)


@given(logits, st.floats(0.1, 3.0), st.integers(1, 50), st.floats(0.05, 0.99))
def test_the_order_is_temperature_then_top_k_then_top_p(row, temperature, k, p):
    expected = row
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        expected = warper(None, expected)
    assert torch.equal(Sampler(temperature, k, p).probabilities(row), expected.softmax(-1))


def test_greedy_ties_go_to_the_lowest_id():
    row = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    for temperature in (0.0, 1e-8):
        sampler = Sampler(temperature)
        assert sampler.choose(row, sampler.generator(CPU)).tolist() == [1]
        assert sampler.probabilities(row).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_the_smallest_temperature_that_samples_stays_finite():
    probabilities = Sampler(1e-6).probabilities(torch.tensor([[40.0, -40.0, 39.0]]))
    assert probabilities.tolist() == [[1.0, 0.0, 0.0]]


def test_draws_follow_the_distribution():
    # Chi-squared over 1e5 draws; 21.7 is the 99th percentile with 9 degrees of freedom. The seed is fixed, so
    # this passes or fails for good.
    row = torch.linspace(-2, 2, 10)[None]
    sampler = Sampler(temperature=0.8, seed=0)
    draws = 100_000
    chosen = sampler.choose(row.expand(draws, -1), sampler.generator(CPU))
    expected = sampler.probabilities(row)[0] * draws
    statistic = ((chosen.bincount(minlength=10) - expected) ** 2 / expected).sum().item()
    assert statistic < 21.7


def test_a_seed_repeats_and_the_global_generator_is_left_alone():
    row = torch.zeros(1, 1000)
    before = torch.random.get_rng_state()
    first, second, other = (
        Sampler(1.0, seed=seed).choose(row, Sampler(1.0, seed=seed).generator(CPU)).item()
        for seed in (1, 1, 2)
    )
    assert first == second != other
    fresh = {Sampler(1.0).choose(row, Sampler(1.0).generator(CPU)).item() for _ in range(8)}
    assert len(fresh) > 1
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    sampler = Sampler(temperature)
    with pytest.raises(NonFiniteLogitsError):
        sampler.choose(torch.tensor([[0.0, bad]]), sampler.generator(CPU))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_settings_without_a_distribution_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}: expected .* got {value}"):
        Sampler(**{name: value})
