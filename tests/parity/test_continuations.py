"""Ids beside transformers': a near-tie is shown and forgiven, any other difference is a failure."""

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.generation import generate
from tinyllama.parity.continuations import (
    SETTINGS,
    compare_continuations,
    draw_scores,
    reference_ids,
    truth_and_rounding,
)
from tinyllama.parity.reference import reference_model
from tinyllama.sampler import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [some_ids(1, length, seed=length)[0].tolist() for length in (7, 3)]


SAMPLED = {"seed": 5, **SETTINGS[0]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_the_same_ids_have_no_flips(settings, attention):
    assert compare_continuations(tiny_model(), PROMPTS, 8, attention=attention, **settings) == []


@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_another_id_is_found_with_the_oracle_s_margin(settings):
    def wrong(*args, **how):
        rows = generate(*args, **how)
        rows[1][4] = (rows[1][4] + 1) % 320
        return rows

    (flip,) = compare_continuations(tiny_model(), PROMPTS, 8, ours=wrong, **settings)
    assert (flip.settings, flip.prompt, flip.step) == (settings, 1, 4)
    assert flip.chosen == (flip.expected + 1) % 320
    assert flip.margin > 1000 * flip.limit > 0
    assert not flip.near_tie


def test_a_tie_that_falls_differently_is_forgiven_and_shown():
    # Two ids with the very same weights: the oracle has no preference at all.
    model = tiny_model()
    (first,) = generate(model, PROMPTS[:1], max_new_tokens=1, eos_ids=())[0]
    twin = (first + 1) % 320
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    low, high = sorted((first, twin))
    (flip,) = compare_continuations(model, PROMPTS[:1], 1, ours=lambda *args, **how: [[high]])
    assert (flip.chosen, flip.expected, flip.margin, flip.near_tie) == (high, low, 0.0, True)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_oracle_makes_the_draw_that_the_sampler_makes(settings):
    model = tiny_model()
    prompts = PROMPTS if "repetition_penalty" not in settings else PROMPTS[:1]
    ours = generate(model, prompts, max_new_tokens=6, eos_ids=(), seed=3, **settings)
    reference = reference_model(model, "sdpa")
    for row, prompt in enumerate(prompts):
        for step in range(6):
            prefix = [*prompt, *ours[row][:step]]
            truth, _ = truth_and_rounding(model, reference, prefix)
            scores = draw_scores(Sampler(seed=3, **settings), truth, prefix, step, row, len(prompts))
            assert scores.argmax() == ours[row][step]


def test_the_global_random_state_is_left_alone():
    reference = reference_model(tiny_model(), "eager")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reference_ids(reference, PROMPTS, 3, seed=7, temperature=1.0)
    assert torch.equal(torch.rand(3), expected)
