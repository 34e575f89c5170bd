"""What the tutor says of code that does not even run, and its way from the skeleton to a whole Llama."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import tinyllama
from tests.learn.solutions import matrices
from tests.scripts.test_scripts import write_checkpoint
from tests.shapes import tiny_model
from tinyllama.learn import STEPS, check, ours
from tinyllama.learn.course import Progress, hint, read, start
from tinyllama.learn.graft import write
from tinyllama.learn.hints import HINTS
from tinyllama.learn.judge import judge
from tinyllama.text.tokenizer import Tokenizer

SOLUTION = Path(matrices.__file__)
# Decoding that keeps the ids, not the keys and values.
AGAIN = """
def again(ids, weights, config, cache):
    cache["ids"] = torch.cat((cache.get("ids", ids[:0]), ids))
    return llama(cache["ids"], weights, config)[-len(ids) :]
"""
RIGHT = {step: getattr(matrices, step) for step in STEPS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model with its tokenizer, in the place of a trained one."""
    tokenizer = Tokenizer.from_folder(write_checkpoint(tmp_path_factory.mktemp("learn")))
    return {"model": tiny_model(vocab_size=tokenizer.vocab_size), "tokenizer": tokenizer}


def nothing(x, weight, eps):
    x * weight


def fails(x, weight, eps):
    return x / weight[:3]


def crossed(x, weight, eps):
    return x @ (x @ x.T)


def endless(x, weight, eps):
    while True:
        with suppress(Exception):
            x = x + 1


def in_place(x, weight, eps):
    x.mul_(matrices.rms_norm(x, weight, eps) / x)
    return x.clone()


def batched(x, weight, eps):
    return matrices.rms_norm(x, weight, eps)[None]


def low(x, weight, eps):
    return matrices.rms_norm(x, weight, eps).half()


def an_array(x, weight, eps):
    return np.asarray(matrices.rms_norm(x, weight, eps).numpy(), dtype=np.float64)


def words(x, weight, eps):
    return "x"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (nothing, "it returns nothing: `return` is missing"),
        (fails, "`return x / weight[:3]`: RuntimeError: The size of tensor a (64)"),
        (endless, "still busy after 0.5 s: line "),
        (crossed, "cannot be multiplied (6x64 and 6x6); a matrix is kept as (out, in), so x @ W.T"),
        (in_place, "it changes one of its arguments"),
        (batched, "there is a batch axis"),
        (low, "it computes in float16"),
        (words, "expected numbers, got str"),
    ],
)
def test_code_that_cannot_be_right_gets_its_reason(function, says):
    verdict = judge("rms_norm", function, seconds=0.5 if function is endless else 60)
    assert verdict.status == "wrong"
    assert says in str(verdict)


def test_arrays_and_lists_of_numbers_are_taken_as_they_are():
    assert judge("rms_norm", an_array).right
    assert judge("frequencies", lambda head_dim, theta: ours.frequencies(head_dim, theta).tolist()).right


def test_computing_the_whole_text_again_is_no_cache():
    names = dict(vars(matrices))
    exec(AGAIN, names)
    assert "for one new token it computes 6 again" in str(judge("decode", names["again"]))
    assert names["block"] is matrices.block  # what was there before the judging is there again


def test_a_draw_without_the_generator_is_found():
    def sample(logits, temperature, top_k, top_p, generator):
        return matrices.sample(logits, temperature, top_k, top_p, None)

    assert "draw with the generator" in str(judge("sample", sample))


@pytest.mark.parametrize("step", [*STEPS, "all"])
def test_a_right_function_in_the_model_changes_no_id(trained, step):
    """Which also shows that grafts reach the model, and are gone afterwards."""
    model, calls = trained["model"], []

    def counted(function):
        def counting(*arguments):
            calls.append(1)
            return function(*arguments)

        return counting

    functions = RIGHT if step == "all" else {step: counted(RIGHT[step])}
    plain = write(model, {}, [1, 5, 9], 8)
    text = write(model, functions, [1, 5, 9], 8)
    assert text.ids == plain.ids
    assert text.whole
    assert calls or step == "all"
    assert write(model, {}, [1, 5, 9], 8).ids == plain.ids
    seen = len(calls)
    model(torch.tensor([[1, 2]]))
    assert len(calls) == seen


def test_a_slow_function_writes_what_it_can_in_time(trained):
    def embedding(ids, table):
        while True:
            pass

    text = write(trained["model"], {"embedding": embedding}, [1, 2], seconds=0.3)
    assert (text.ids, text.whole) == ([], False)


def test_the_way_from_the_skeleton_to_a_whole_llama(trained, tmp_path):
    mine = tmp_path / "mine.py"
    start(mine)
    with pytest.raises(tinyllama.InputError, match="is there already"):
        start(mine)
    assert list(read(mine)) == list(STEPS)
    assert f"learn.py check {mine.name}" in mine.read_text("utf-8")
    report = check(mine, **trained)
    assert {one.status for one in report.verdicts} == {"missing"}
    assert (report.text, report.whole, report.right) == ("", None, [])

    report = check({"rope": matrices.rope, "embedding": nothing}, **trained)
    assert [one.status for one in report.verdicts] == ["wrong", "right"]
    assert report.text.startswith("With rope of yours in a trained model")
    assert "TypeError" in str(report)

    mine.write_text(SOLUTION.read_text("utf-8"), "utf-8")
    report = check(mine, **trained)
    assert report.whole is not None
    assert report.whole.passed
    assert min(report.whole.speed, report.whole.our_speed) > 0
    assert "top-1 100.0%" in str(report)
    assert report._repr_html_().count("✓ right") == 10


def test_text_of_a_learner_stays_text_in_a_notebook():
    def embedding(ids, table):
        raise ValueError("<script>alert(1)</script>")

    assert "<script>" not in check(embedding=embedding)._repr_html_()


def test_each_hint_comes_once_and_the_last_stays(tmp_path):
    mine = tmp_path / "mine.py"
    start(mine)
    for count in (1, 2, 3, 4, 4):
        assert hint(mine, "rope") == list(HINTS["rope"][:count])
    assert Progress.of(mine).hints == {"rope": 4}
    Progress.place(mine).write_text("[]", "utf-8")
    with pytest.raises(tinyllama.InputError, match="remove it to begin anew"):
        hint(mine, "rope")
    for step, path, says in (("x", mine, "is no step"), ("rope", tmp_path / "none.py", "begin with")):
        with pytest.raises(tinyllama.InputError, match=says):
            hint(path, step)


def test_what_cannot_be_checked_is_refused(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n", "utf-8")
    for call, says in (
        (lambda: check(), "nothing to check"),
        (lambda: check(roap=len), "roap is no step"),
        (lambda: check(rope=3), "rope is not a function"),
        (lambda: check(empty), "has none of the functions"),
        (lambda: check(tmp_path / "none.py"), "no such file"),
    ):
        with pytest.raises(tinyllama.InputError, match=says):
            call()
