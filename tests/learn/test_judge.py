"""The tutor: right solutions of any style pass, classical mistakes are named, and nothing else breaks it."""

from __future__ import annotations

import inspect

import pytest

from tests.learn.planted import PLANTED
from tests.learn.solutions import complex_numbers, loops, matrices
from tinyllama.learn import ours
from tinyllama.learn.hints import HINTS
from tinyllama.learn.judge import STEPS, judge


@pytest.mark.parametrize("style", [matrices, loops, complex_numbers], ids=lambda style: style.__name__[22:])
@pytest.mark.parametrize("step", STEPS)
def test_a_right_function_passes_in_any_style(step, style):
    verdict = judge(step, getattr(style, step))
    assert verdict.right, verdict
    drawn_otherwise = (step, style) == ("sample", loops)
    assert ("than transformers" in verdict.says) == drawn_otherwise


@pytest.mark.parametrize("step", STEPS)
def test_our_own_functions_pass(step):
    assert judge(step, ours.FUNCTIONS[step]).right


def planted(step, old, new):
    """The solution's function with a mistake, in a module of its own."""
    source = inspect.getsource(getattr(matrices, step))
    assert old in source
    names = dict(vars(matrices))
    exec(compile(source.replace(old, new), f"<{step}>", "exec"), names)
    return names[step]


@pytest.mark.parametrize(
    ("step", "old", "new", "suspect"), [(s, *one) for s, all in PLANTED.items() for one in all]
)
def test_a_classical_mistake_is_named(step, old, new, suspect):
    verdict = judge(step, planted(step, old, new))
    assert verdict.status == "wrong"
    assert suspect in str(verdict.suspect), verdict


def test_every_step_has_six_mistakes_and_hints_that_end_with_a_formula():
    assert list(PLANTED) == list(HINTS) == list(STEPS)
    for step in STEPS:
        assert len(PLANTED[step]) >= 6
        assert len(HINTS[step]) >= 3
