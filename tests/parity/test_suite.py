"""What the suite judges, and that the report tells right from wrong."""

import json
from dataclasses import replace

import pytest
import torch

from tests.fast.compiled import compiled
from tests.shapes import some_ids, tiny_config
from tinyllama.attention import eager
from tinyllama.fast import native
from tinyllama.fast.claims import Claim
from tinyllama.kernels import KERNELS
from tinyllama.pages import plain
from tinyllama.parity import suite
from tinyllama.parity.changed import changed
from tinyllama.parity.continuations import Continuations, IdFlip
from tinyllama.parity.gradients import Gradients, WeightGradient
from tinyllama.parity.measure import Limits
from tinyllama.parity.mutations import MUTATIONS, Mutation
from tinyllama.parity.notebook import Notebook
from tinyllama.parity.report import Case, Report, Row
from tinyllama.parity.subjects import DTYPES, Extent, Shape
from tinyllama.parity.suite import Suite

pytestmark = pytest.mark.usefixtures("one_thread")

# Logits alone.
FLOAT32 = Extent(("float32",), positions=64, prompts=0, greedy_ids=0, seeds=0, sampled_ids=0)
# Rows that can be divided into groups of 64 can be rounded to 8 bits.
DIVISIBLE = {"intermediate_size": 192}


class Subject(Shape):
    """A tiny model with two texts, a long one, and prompts."""

    def __init__(self, **changes):
        super().__init__("tiny", tiny_config(**changes))

    def texts(self, extent):
        return {"long": some_ids(1, 140)[0].tolist(), "short": some_ids(1, 20, seed=1)[0].tolist()}

    def long_text(self, extent):
        return some_ids(1, extent.long)[0].tolist()


class Trained(Subject):
    trained = True


def judged(kernels, extent=FLOAT32, search=False, subject=None):
    one = Suite(search)
    one.judge(subject or Subject(), kernels, extent)
    return one.report


def found(report):
    return [(search.who, search.text, search.found and search.found.address) for search in report.searches]


# --- logits ----------------------------------------------------------------------------------------------


def test_every_dtype_is_judged_and_fast_layers_in_every_dtype_but_float64():
    report = judged(KERNELS, replace(FLOAT32, dtypes=DTYPES))
    assert report.passed
    assert [case.dtype for case in report.cases] == list(DTYPES)
    for case in report.cases:
        assert [row.who for row in case.rows][:4] == [
            f"{whose} {kernel}" for whose in ("transformers", "tinyllama") for kernel in ("eager", "sdpa")
        ]
        last, exact = case.rows[-1], case.dtype != "float64"
        assert (last.who, last.same_bits) == (
            ("tinyllama stored", None) if exact else ("tinyllama sdpa", False)
        )
        assert all(row.same_bits is exact for row in case.rows[2:4])
    # The tiny shape's rows of 176 cannot be rounded.
    assert [case.note for case in report.cases] == ["", suite.INDIVISIBLE_NOTE, "", ""]


def test_a_divergence_is_looked_for_where_logits_fail_or_on_request():
    def louder(q, k, v, context):
        return eager(q, k, 1.01 * v, context)

    def late(q, k, v, context):
        z = eager(q, k, v, context).clone()
        z[:, :, 130:] += 0.01
        return z

    report = judged({"eager": eager, "louder": louder, "late": late})
    at = "layers.0.self_attn.z"
    beginning, whole = "long, first 128 tokens", "long"
    assert found(report) == [("tinyllama louder", beginning, at), ("tinyllama late", whole, at)]
    assert report.searches[1].found.place[1] >= 130
    assert not report.passed
    assert found(judged({"eager": eager})) == []
    assert found(judged({"eager": eager}, search=True)) == [("tinyllama eager", "all texts", None)]


def test_a_long_text_is_judged_by_the_fused_kernel_alone():
    case = judged(KERNELS, replace(FLOAT32, long=300)).cases[1]
    assert (case.model, case.texts) == ("tiny, long text", {"english": 300})
    assert [row.who for row in case.rows] == ["transformers sdpa", "tinyllama sdpa"]
    assert case.rows[-1].same_bits


def test_logits_of_nan_are_json_and_failures():
    report = judged({"nan": lambda q, k, v, context: eager(q, k, v * torch.nan, context)})
    json.dumps(plain(report), allow_nan=False)
    assert "tiny float32: tinyllama nan: a logit is not finite" in report.failures


# --- 8-bit weights ---------------------------------------------------------------------------------------


def test_8_bit_weights_are_judged_as_a_computation_and_of_trained_models_as_a_rounding():
    report = judged(KERNELS, subject=Subject(**DIVISIBLE))
    assert report.passed
    plain_case, case = report.cases
    assert (plain_case.note, case.note) == ("", suite.RANDOM_NOTE)
    assert (case.model, case.texts) == ("tiny, int8 weights", {"long": 64, "short": 20})
    whose = ["transformers eager", "transformers sdpa", "tinyllama int8"]
    assert [row.who for row in case.rows] == whose
    # A kernel of the user's is judged without them.
    assert len(judged({"eager": eager}, subject=Subject(**DIVISIBLE)).cases) == 1

    report = judged(KERNELS, search=True, subject=Trained(**DIVISIBLE))
    _, computed, rounded = report.cases
    assert computed.texts == rounded.texts == {"long": 140, "short": 20}
    assert (rounded.model, rounded.limits) == (
        "tiny, int8 weights against the full ones",
        suite.INT8_LIMITS,
    )
    assert rounded.rows[0].relative > 1000 * computed.rows[-1].relative
    # Every matrix diverges by its rounding, so that is not searched.
    assert [search.model for search in report.searches] == [*["tiny"] * 3, "tiny, int8 weights"]


@compiled
def test_a_wrong_8_bit_product_is_found_in_the_model_of_rounded_weights():
    assert judged(KERNELS, subject=Subject(**DIVISIBLE)).passed  # now the compiled code is trusted
    right = native.linear
    wrong = (native, "linear", lambda weight, scales, x: right(weight, scales, x.half().float()))
    with changed(wrong):
        report = judged(KERNELS, subject=Subject(**DIVISIBLE))
    at = "layers.0.self_attn.q_proj"
    assert [(who, address) for who, _, address in found(report)] == [
        ("tinyllama stored", at),
        ("tinyllama int8", at),
    ]


def test_without_a_compiler_the_rows_say_so():
    with changed((Claim, "check", lambda claim, wait=0.0: False)):
        report = judged(KERNELS, subject=Subject(**DIVISIBLE))
    assert report.passed
    assert all(case.rows[-1].who.endswith(" on PyTorch's own products") for case in report.cases)


# --- ids, gradients, planted bugs ------------------------------------------------------------------------


def test_ids_and_gradients_are_judged_where_the_extent_has_them():
    extent = replace(FLOAT32, prompts=3, greedy_ids=5, seeds=2, sampled_ids=4, gradients=True)
    report = judged(KERNELS, extent)
    assert report.passed
    assert [(part.what, part.calls, part.ids, part.flips) for part in report.continuations] == [
        ("greedy, batch of 3", 1, 15, []),
        ("greedy, alone", 3, 15, []),
        ("greedy, stored", 3, 15, []),
        ("sampled, alone", 6, 24, []),
        ("sampled, batch of 3", 2, 24, []),
    ]
    (gradients,) = report.gradients
    assert (gradients.positions, gradients.weights, gradients.same_bits) == (64, 39, 39)
    # Both need our own kernels and float32.
    for kernels, dtypes in (({"eager": eager}, ("float32",)), (KERNELS, ("float64",))):
        less = judged(kernels, replace(extent, dtypes=dtypes))
        assert (less.continuations, less.gradients) == ([], [])


def test_the_fixture_s_bugs_and_gradients_are_judged_and_a_missed_bug_is_a_failure():
    def nothing(model):
        return changed()

    told = []
    one = Suite(done=told.append)
    missed = Mutation("missed", nothing, "norm", "the norm is skipped")
    one.judge_fixture([MUTATIONS[0], Mutation("harmless", nothing), missed])
    assert [trial.right for trial in one.report.mutations] == [True, True, False]
    assert one.report.failures == ["mutation missed: judged wrongly"]
    assert [(part.model, part.weights) for part in one.report.gradients] == [("unit-gain fixture", 39)]
    assert told == ["planted bugs", "unit-gain fixture, gradients"]


# --- the verdict -----------------------------------------------------------------------------------------


def test_the_verdict_has_every_failure_of_every_section():
    name = ("m", "float32")
    near = IdFlip({}, prompt=0, step=2, expected=9, chosen=7, margin=1e-6, limit=1e-5)
    gradients = [WeightGradient("a", 1e-7, 1e-7, 2e-7, True), WeightGradient("b", 3e-7, 1e-7, 2e-7, False)]
    right = Row("x", False, *[1.0] * 9, flips=[], same_bits=None, by_layer=[], by_position={}, failures=[])
    rows = [right, replace(right, who="y", failures=["1", "2"])]
    case = Case(*name, {"english": 1}, "", Limits(), rows)
    report = Report(
        cases=[case],
        continuations=[Continuations(*name, "greedy", 1, 9, [near, replace(near, margin=1e-2)])],
        gradients=[Gradients(*name, 64, gradients)],
        notebook=[Notebook(*name, ["notebook, greedy: differs"])],
    )
    assert not report.passed
    assert report.failures[:2] == ["m float32: y: 1", "m float32: y: 2"]
    assert report.failures[2].startswith("m float32: prompt 0, new token 2: expected 9, got 7; ")
    assert report.failures[3].startswith("m float32: gradient of b: relRMS 3.00e-07 is over ")
    assert report.failures[4:] == ["m float32: notebook, greedy: differs"]
    assert [flip.near_tie for flip in report.continuations[0].flips] == [True, False]
    assert (report.gradients[0].worst.weight, report.gradients[0].same_bits) == ("b", 1)
    assert Report().passed
