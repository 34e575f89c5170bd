"""Ids beside transformers': a real difference is a failure, a near-tie is told and forgiven."""

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.generation import generate
from tinyllama.parity import continuations
from tinyllama.parity.continuations import SETTINGS, compare_continuations, reference_ids
from tinyllama.parity.reference import reference_model
from tinyllama.sampler import Sampler

PROMPTS = [some_ids(1, length, seed=length)[0].tolist() for length in (7, 3)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"seed": 5, **SETTINGS[0]}])
def test_the_same_ids_have_no_flips(settings, attention):
    result = compare_continuations(tiny_model(), PROMPTS, 8, attention=attention, **settings)
    assert (result.flips, result.failures) == ((), [])
    assert (result.prompts, result.ids, result.settings) == (2, 16, settings)


@pytest.mark.parametrize("settings", [{}, {"seed": 5, **SETTINGS[0]}])
def test_another_id_is_found_with_the_oracle_s_margin(settings, monkeypatch):
    def wrong(*args, **kwargs):
        rows = generate(*args, **kwargs)
        rows[1][4] = (rows[1][4] + 1) % 320
        return rows

    monkeypatch.setattr(continuations, "generate", wrong)
    result = compare_continuations(tiny_model(), PROMPTS, 8, **settings)
    (flip,) = result.flips
    assert (flip.row, flip.step, flip.ours) == (1, 4, (flip.theirs + 1) % 320)
    assert flip.margin > 1000 * flip.limit > 0
    assert not flip.near_tie
    (failure,) = result.failures
    assert f"prompt 1, new token 4: expected {flip.theirs}, got {flip.ours}" in failure


def test_a_tie_that_falls_otherwise_is_forgiven_and_shown(monkeypatch):
    # Two ids with the very same weights: the oracle has no preference at all.
    model = tiny_model()
    (first,) = generate(model, PROMPTS[:1], max_new_tokens=1, eos_ids=())[0]
    twin = (first + 1) % 320
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    low, high = sorted((first, twin))
    monkeypatch.setattr(continuations, "reference_ids", lambda *args, **kwargs: [[high]])
    result = compare_continuations(model, PROMPTS[:1], 1)
    (flip,) = result.flips
    assert (flip.ours, flip.theirs, flip.margin) == (low, high, 0.0)
    assert flip.near_tie
    assert result.failures == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_oracle_makes_the_draw_that_the_sampler_makes(settings):
    model = tiny_model()
    prompts = PROMPTS if "repetition_penalty" not in settings else PROMPTS[:1]
    ours = generate(model, prompts, max_new_tokens=6, eos_ids=(), seed=3, **settings)
    reference = reference_model(model, "sdpa")
    for row, prompt in enumerate(prompts):
        for step in range(6):
            prefix = [*prompt, *ours[row][:step]]
            truth, _ = continuations._truth(model, reference, prefix)
            scores = continuations._scores(
                Sampler(seed=3, **settings), truth, prefix, step, row, len(prompts)
            )
            assert scores.argmax() == ours[row][step]


def test_the_global_random_state_is_left_alone():
    reference = reference_model(tiny_model(), "eager")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reference_ids(reference, PROMPTS, 3, seed=7, temperature=1.0)
    assert torch.equal(torch.rand(3), expected)
