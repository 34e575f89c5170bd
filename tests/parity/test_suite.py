"""What the suite judges, what it makes of failures, and the line that tells how far it is."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tests.shapes import some_ids, tiny_config
from tinyllama.attention import eager
from tinyllama.fast import native
from tinyllama.kernels import KERNELS
from tinyllama.parity import report, suite
from tinyllama.parity.continuations import SETTINGS, Continuations, Flip
from tinyllama.parity.gradients import WeightGradient
from tinyllama.parity.mutations import MUTATIONS, Trial
from tinyllama.parity.subjects import QUICK, Shape
from tinyllama.parity.suite import Suite
from tinyllama.progress import progress_line

FLOAT32 = replace(QUICK, dtypes=("float32",))


class Subject(Shape):
    """A tiny model with two texts, a long one, and prompts."""

    def __init__(self, **changes):
        super().__init__("tiny", tiny_config(**changes))

    def texts(self, extent):
        return {"long": some_ids(1, 140)[0].tolist(), "short": some_ids(1, 20, seed=1)[0].tolist()}

    def long_text(self, extent):
        return some_ids(1, extent.long)[0].tolist()


def louder(q, k, v, context):
    return eager(q, k, 1.01 * v, context)


class Trained(Subject):
    trained = True


def judged(kernels, extent=FLOAT32, search=False, subject=None):
    one = Suite(search)
    one.judge(subject or Subject(), kernels, extent)
    return report.concluded(one.figures)


@pytest.fixture
def continued(monkeypatch):
    """No ids are generated: every call is noted instead, and has the flips that are put here."""
    calls, flips = [], []

    def compare(model, prompts, count, **how):
        calls.append((len(prompts), count, how))
        return Continuations(how, len(prompts), count * len(prompts), tuple(flips))

    monkeypatch.setattr(suite, "compare_continuations", compare)
    compare.calls, compare.flips = calls, flips
    return compare


# --- logits ----------------------------------------------------------------------------------------------


def test_every_dtype_is_judged_by_the_truth_of_its_own_weights(monkeypatch):
    # float32's weights are float64's: one truth serves both.
    asked, truths = [], suite.truths

    def noted(model, texts):
        asked.append(str(model.embed_tokens.weight.dtype))
        return truths(model, texts)

    monkeypatch.setattr(suite, "truths", noted)
    dtypes = ("float64", "float32", "bfloat16", "float16")
    figures = judged({"sdpa": KERNELS["sdpa"]}, replace(QUICK, dtypes=dtypes))
    assert [case["dtype"] for case in figures["cases"]] == list(dtypes)
    assert asked == ["torch.float64", "torch.bfloat16", "torch.float16"]
    assert figures["passed"]
    assert all(case["rows"][-1]["same_bits"] for case in figures["cases"][1:])


def test_where_logits_fail_the_divergence_is_looked_for(continued):
    figures = judged({"eager": eager, "louder": louder})
    (search,) = figures["searches"]
    assert (search["who"], search["text"]) == ("tinyllama louder", "long, first 128 tokens")
    assert search["found"]["address"] == "layers.0.self_attn.z"
    assert not figures["passed"]


def test_a_divergence_late_in_a_text_is_found_in_the_whole_text(continued):
    def late(q, k, v, context):
        z = eager(q, k, v, context).clone()
        z[:, :, 130:] += 0.01
        return z

    (search,) = judged({"late": late})["searches"]
    assert search["text"] == "long"
    assert search["found"]["place"][1] >= 130


def test_on_request_it_is_looked_for_in_what_passes_too(continued):
    figures = judged(KERNELS, search=True)
    assert figures["passed"]
    assert [(search["who"], search["text"], search["found"]) for search in figures["searches"]] == [
        ("tinyllama eager", "all texts", None),
        ("tinyllama sdpa", "all texts", None),
        ("tinyllama fast", "all texts", None),
    ]


def test_a_long_text_is_judged_by_the_fused_kernel_alone(continued):
    figures = judged(KERNELS, replace(FLOAT32, long=300))
    case = figures["cases"][1]
    assert (case["model"], case["texts"]) == ("tiny, long text", {"english": 300})
    assert [row["who"] for row in case["rows"]] == ["transformers sdpa", "tinyllama sdpa"]
    assert case["rows"][-1]["same_bits"]


# --- the fast layers -------------------------------------------------------------------------------------

DIVISIBLE = {"intermediate_size": 192}


def test_fast_layers_are_judged_in_every_dtype_but_float64(continued):
    dtypes = ("float64", "float32", "bfloat16", "float16")
    figures = judged(KERNELS, replace(QUICK, dtypes=dtypes))
    assert figures["passed"]
    assert [case["dtype"] for case in figures["cases"]] == list(dtypes)
    last = [case["rows"][-1] for case in figures["cases"]]
    assert [row["who"] for row in last] == ["tinyllama sdpa", *["tinyllama fast"] * 3]
    assert [row["same_bits"] for row in last[1:]] == [None] * 3
    # The tiny shape's rows of 176.
    notes = [bool(case["note"]) for case in figures["cases"]]
    assert notes == [False, True, False, False]
    assert figures["cases"][1]["note"] == suite.INDIVISIBLE_NOTE


def test_8_bit_weights_are_judged_as_a_computation_and_of_trained_models_as_a_rounding(continued):
    dtypes = ("float32", "bfloat16")
    figures = judged(KERNELS, replace(QUICK, dtypes=dtypes), subject=Subject(**DIVISIBLE))
    assert figures["passed"]
    names = [(case["model"], case["dtype"]) for case in figures["cases"]]
    assert names == [("tiny", "float32"), ("tiny, int8 weights", "float32"), ("tiny", "bfloat16")]
    plain, case, _ = figures["cases"]
    assert (plain["note"], case["note"]) == ("", suite.RANDOM_NOTE)
    assert case["texts"] == {"long": 64, "short": 20}
    assert [row["who"] for row in case["rows"]] == [
        *("transformers eager", "transformers sdpa", "tinyllama int8")
    ]

    figures = judged(KERNELS, subject=Trained(**DIVISIBLE))
    _, computed, rounded = figures["cases"]
    assert computed["note"] == ""
    assert computed["texts"] == rounded["texts"] == {"long": 140, "short": 20}
    assert rounded["model"] == "tiny, int8 weights against the full ones"
    (row,) = rounded["rows"]
    assert row["relative"] > 1000 * computed["rows"][-1]["relative"]
    assert rounded["limits"] == {
        **{"relative": None, "kl_mean": 0.01, "kl_max": None, "flip_margin": None},
        **{"top1": 0.95, "nll_change": pytest.approx(0.00995, rel=1e-3)},
    }


def test_8_bit_weights_that_cost_too_much_fail_and_are_not_searched(continued, monkeypatch):
    monkeypatch.setattr(suite, "INT8_LIMITS", replace(suite.INT8_LIMITS, kl_mean=1e-9))
    figures = judged(KERNELS, search=True, subject=Trained(**DIVISIBLE))
    assert not figures["passed"]
    assert (
        "tiny, int8 weights against the full ones float32: tinyllama int8: KL mean" in figures["failures"][0]
    )
    searches = [(search["model"], search["who"], search["found"]) for search in figures["searches"]]
    assert searches[-1] == ("tiny, int8 weights", "tinyllama int8", None)
    assert len(searches) == 4


def test_a_wrong_8_bit_product_is_found_in_the_model_of_rounded_weights(continued, monkeypatch):
    if not native.available():
        pytest.skip("needs a C compiler")
    right = native.matvec
    monkeypatch.setattr(native, "matvec", lambda weight, scales, x: right(weight, scales, x.half().float()))
    figures = judged(KERNELS, subject=Subject(**DIVISIBLE))
    assert [(search["who"], search["found"]["address"]) for search in figures["searches"]] == [
        ("tinyllama fast", "layers.0.self_attn.q_proj"),
        ("tinyllama int8", "layers.0.self_attn.q_proj"),
    ]
    assert all(search["found"]["place"][0] >= 64 for search in figures["searches"][:1])


def test_without_a_compiler_the_rows_say_so(continued, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    figures = judged(KERNELS, subject=Subject(**DIVISIBLE))
    assert figures["passed"]
    assert [case["rows"][-1]["who"] for case in figures["cases"]] == [
        "tinyllama fast on PyTorch's own products",
        "tinyllama int8 on PyTorch's own products",
    ]


def test_a_kernel_of_ones_own_is_judged_without_them(continued):
    (case,) = judged({"eager": eager}, subject=Subject(**DIVISIBLE))["cases"]
    assert [row["who"] for row in case["rows"]][2:] == ["tinyllama eager"]


# --- ids -------------------------------------------------------------------------------------------------


def test_ids_are_compared_alone_and_in_batches_under_every_setting(continued):
    extent = replace(FLOAT32, prompts=3, greedy_ids=5, seeds=2, sampled_ids=4)
    figures = judged(KERNELS, extent)
    assert continued.calls == [
        (3, 5, {"attention": "eager"}),
        *[(1, 5, {})] * 3,
        *[(1, 4, {"seed": seed, **how}) for how in SETTINGS for seed in (0, 1)],
        *[(3, 4, {"seed": seed, "attention": "eager", **how}) for seed, how in enumerate(SETTINGS[:2])],
    ]
    parts = figures["continuations"]
    assert [(part["calls"], part["ids"]) for part in parts] == [(1, 15), (3, 15), (6, 24), (2, 24)]


@pytest.mark.parametrize(
    ("kernels", "dtype"), [({"eager": eager}, "float32"), (KERNELS, "float64")], ids=["a kernel", "float64"]
)
def test_ids_need_both_kernels_and_float32(continued, kernels, dtype):
    assert judged(kernels, replace(QUICK, dtypes=(dtype,)))["continuations"] == []
    assert continued.calls == []


@pytest.mark.parametrize(("margin", "near_tie"), [(1e-6, True), (1e-2, False)])
def test_a_near_tie_is_shown_and_only_a_real_difference_fails(continued, margin, near_tie):
    continued.flips.append(Flip(row=0, step=2, ours=7, theirs=9, margin=margin, limit=1e-5))
    figures = judged(KERNELS)
    parts = figures["continuations"]
    assert [flip["near_tie"] for flip in parts[0]["flips"]] == [near_tie]
    assert figures["passed"] == near_tie
    if not near_tie:
        assert "tiny float32: prompt 0, new token 2: expected 9, got 7; " in figures["failures"][0]
        assert len(figures["failures"]) == len(continued.calls)


# --- gradients, planted bugs -----------------------------------------------------------------------------


def test_gradients_are_judged_where_the_extent_has_them(continued, monkeypatch):
    asked = []

    def one_wrong(model, ids):
        asked.append(ids)
        return [WeightGradient("a", 1e-7, 1e-7, 2e-7, True), WeightGradient("b", 3e-7, 1e-7, 2e-7, False)]

    monkeypatch.setattr(suite, "compare_gradients", one_wrong)
    figures = judged(KERNELS, replace(FLOAT32, gradients=True))
    assert asked == [some_ids(1, 140)[0].tolist()[:64]]
    (part,) = figures["gradients"]
    assert (part["weights"], part["same_bits"], part["worst"]["weight"]) == (2, 1, "b")
    assert figures["failures"] == ["tiny float32: gradient of b: relRMS 3.00e-07 is over 2 R = 2.00e-07"]
    assert judged(KERNELS)["gradients"] == []


def test_on_the_fixture_every_planted_bug_and_every_gradient_is_judged_rightly():
    told = []
    one = Suite(done=told.append)
    one.judge_fixture()
    figures = report.concluded(one.figures)
    assert figures["passed"]
    assert sum(trial["right"] for trial in figures["mutations"]) == 16
    assert [trial["name"] for trial in figures["mutations"] if trial["passed"]] == ["positions + 1"]
    (part,) = figures["gradients"]
    assert (part["model"], part["weights"], part["failures"]) == ("unit-gain fixture", 39, [])
    assert told[0] == "planted bugs"
    json.dumps(figures, allow_nan=False)


def test_a_bug_that_the_gate_lets_pass_is_a_failure(monkeypatch):
    missed = [Trial(mutation, 1.0, True, None) for mutation in MUTATIONS]
    monkeypatch.setattr(suite, "try_mutations", lambda: iter(missed))
    one = Suite()
    one.judge_fixture()
    failures = report.concluded(one.figures)["failures"]
    assert len(failures) == 15
    assert "mutation eps 1e-6: judged wrongly" in failures


# --- the verdict -----------------------------------------------------------------------------------------


def test_the_verdict_has_every_failure_of_every_section():
    def part(*failures):
        return {"model": "m", "dtype": "float32", "failures": list(failures)}

    figures = {name: [] for name in report.SECTIONS}
    assert report.concluded(figures)["passed"]
    figures["cases"] = [{**part(), "rows": [{"who": who, "failures": [who * 2, who * 3]} for who in "ab"]}]
    for name in ("continuations", "gradients", "notebook"):
        figures[name] = [part(), part(f"{name} 1", f"{name} 2")]
    figures["mutations"] = [{"name": "eps", "right": False}, {"name": "theta", "right": True}]
    concluded = report.concluded(figures)
    assert not concluded["passed"]
    assert concluded["failures"] == [
        *("m float32: a: aa", "m float32: a: aaa", "m float32: b: bb", "m float32: b: bbb"),
        *(f"m float32: {name} {n}" for name in ("continuations", "gradients", "notebook") for n in (1, 2)),
        "mutation eps: judged wrongly",
    ]


def test_figures_of_nan_are_json_and_failures(continued):
    figures = judged({"nan": lambda q, k, v, context: eager(q, k, v * torch.nan, context)}, QUICK)
    json.dumps(figures, allow_nan=False)
    assert "tiny bfloat16: tinyllama nan: a logit is not finite" in figures["failures"]


# --- progress --------------------------------------------------------------------------------------------


def test_without_a_terminal_the_steps_without_a_comma_are_lines(capsys):
    with progress_line() as done:
        for what in ("tiny float32", "tiny float32, eager", "a\x1b[2Jname"):
            done(what)
    assert capsys.readouterr() == ("", "tiny float32\na\\x1b[2Jname\n")


def test_at_a_terminal_one_line_tells_of_every_step_and_goes_away(monkeypatch, capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, legacy_windows=False)
    monkeypatch.setattr("tinyllama.progress.Console", lambda **how: console)
    with progress_line() as done:
        done("[bold]tiny[/bold]\x07, eager")
    _, shown, after = screen.getvalue().rpartition("[bold]tiny[/bold]\\x07, eager")
    assert shown
    assert "\x1b[2K" in after  # the line is erased
    assert capsys.readouterr() == ("", "")
