"""Intervals hold what they promise, and two runs are asked the same."""

from __future__ import annotations

import math

import pytest
import torch
from lm_eval.models.dummy import DummyLM

from tinyllama.evaluation.paired import MEANS, difference_interval, interval, run, scores
from tinyllama.evaluation.tasks import loaded, toys

MEAN = MEANS["mean"]


def answers(*right):
    return torch.tensor(right, dtype=torch.float64)


def test_answers_that_did_not_change_leave_some_doubt():
    same = answers(1, 0, 1, 1)
    found = difference_interval(same, same, MEAN)
    # b = c = 1/2, N = 6: 1.96 / 6 to both sides.
    assert (found.low, found.high) == pytest.approx((-1.96 / 6, 1.96 / 6))
    assert found.method == "Agresti-Min"


@pytest.mark.parametrize(
    ("lose", "gain", "n"), [(0.05, 0.05, 40), (0.3, 0.02, 40), (0.1, 0.0, 20), (0.2, 0.1, 300)]
)
def test_the_interval_of_right_answers_holds_the_truth_19_times_of_20(lose, gain, n):
    draws = torch.rand(400, n, generator=torch.Generator().manual_seed(1))
    before = answers(*[1.0] * (n // 2), *[0.0] * (n - n // 2))
    held = 0
    for draw in draws:
        after = torch.where(before == 1, (draw >= lose).double(), (draw < gain).double())
        found = difference_interval(before, after, MEAN)
        held += found.low <= (gain * (n - n // 2) - lose * (n // 2)) / n <= found.high
    assert held / len(draws) >= 0.93


def test_pairs_make_a_small_difference_certain():
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    found = difference_interval(values, values + 0.1, MEAN)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    alone = interval(values, MEAN)
    # The bootstrap of a mean is close to the normal interval.
    width = 2 * 1.96 * values.std().item() / math.sqrt(200)
    assert alone.high - alone.low == pytest.approx(width, rel=0.1)


def test_a_perplexity_counts_its_words():
    before = torch.tensor([[-10.0, 5.0], [-40.0, 20.0]] * 10, dtype=torch.float64)  # e^2 everywhere
    after = before * torch.tensor([1.5, 1.0])
    found = difference_interval(before, after, MEANS["weighted_perplexity"])
    assert (found.low, found.high) == pytest.approx((math.exp(3) - math.exp(2),) * 2)


def test_few_documents_have_no_bootstrap_interval():
    values = torch.tensor([1.5, 2.5, 3.5, 4.5], dtype=torch.float64)
    assert interval(values, MEAN) is None
    assert interval((values > 2).double(), MEAN) is not None


def test_both_runs_are_asked_the_same_and_differences_are_those_of_the_pairs(monkeypatch):
    with loaded(list(toys()), fewshot=2) as tasks:
        first, second = run(DummyLM(), tasks, limit=6), run(DummyLM(), tasks, limit=6)
        for name in tasks["tasks"]:
            for one, other in zip(first["samples"][name], second["samples"][name], strict=True):
                assert one["arguments"] == other["arguments"]
        prompt = first["samples"]["toy_generation"][0]["arguments"][0][0]
        assert prompt.count("Question:") == 3
        monkeypatch.setattr(
            DummyLM, "loglikelihood", lambda lm, asked: [(-float(len(r.args[1])), True) for r in asked]
        )
        changed = run(DummyLM(), tasks, limit=6)
        found = scores(tasks, first, changed)
    assert {score.task for score in found} == set(toys())
    for score in found:
        assert score.documents == 6
        assert score.difference == score.changed - score.unchanged
        if score.metric in ("acc", "acc_norm", "exact_match"):
            assert score.difference == pytest.approx(sum(after - before for before, after in score.pairs) / 6)
    assert any(score.difference for score in found)


def test_a_group_of_tasks_has_a_row_without_an_interval():
    class Task:
        def aggregation(self):
            return {"acc": lambda values: 0.0}

    def results(value):
        samples = [{"filter": "none", "metrics": ["acc"], "acc": value}]
        return {
            "results": {"one": {"acc,none": value}, "all": {"acc,none": value, "acc_stderr,none": 0.1}},
            "groups": {"all": {"name": "all", "acc,none": value, "acc_stderr,none": 0.1}},
            "higher_is_better": {"one": {"acc": True}},
            "samples": {"one": samples},
        }

    one, group = scores({"tasks": {"one": Task()}}, results(0.25), results(0.5))
    assert (one.task, one.documents, one.difference_interval) == ("one", 1, None)  # no mean, so no interval
    assert (group.task, group.metric, group.documents) == ("all", "acc", None)
    assert (group.unchanged, group.changed, group.difference) == (0.25, 0.5, 0.25)
