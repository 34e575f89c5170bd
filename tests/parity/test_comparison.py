"""Figures against closed forms, what the criteria let pass, and comparisons of any two callables."""

import math

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager
from tinyllama.kernels import KERNELS
from tinyllama.parity import compare, difference, judge, oracle_logits
from tinyllama.parity.comparison import REFERENCES, compare_runs, kernel_run, reference_run, truths
from tinyllama.parity.measure import limits
from tinyllama.parity.reference import config_fields, reference_model

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

IDS = some_ids(1, 64)[0].tolist()


def off_by(error, truth):
    return difference(truth + error, truth)


def test_the_figures_of_a_worked_example():
    truth = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    logits = truth + torch.tensor([[0.0, 0.0, -2.5], [0.0, 0.5, 0.0]])
    got = difference(logits, truth, ids=[5, 2])
    assert got.max == 2.5
    assert got.mean == pytest.approx(3.0 / 6)
    assert got.rms == pytest.approx(math.sqrt((2.5**2 + 0.5**2) / 6))
    assert got.relative == pytest.approx(math.sqrt((2.5**2 + 0.5**2) / (1 + 9 + 4)))
    assert got.top1 == 0.5
    assert got.flip_margin == 2.0  # the oracle's 3.0 for its own token, 1.0 for the chosen one
    p, q = truth[0].softmax(0), logits[0].softmax(0)
    assert got.kl[0] == pytest.approx((p * (p / q).log()).sum())
    # Only the first token has a successor: id 2.
    assert got.nll_change == pytest.approx((p[2].log() - q[2].log()).item())


@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 2), (31, 40), (32, 3), (33, 40), (600, 7)])
def test_measuring_in_parts_changes_nothing(positions, vocabulary):
    generator = torch.Generator().manual_seed(positions)
    truth = torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64)
    logits = truth + 0.1 * torch.randn(positions, vocabulary, generator=generator)
    got = difference(logits, truth)
    assert len(got.kl) == positions
    assert got.rms == pytest.approx((logits - truth).square().mean().sqrt().item())
    assert got.kl_max >= got.kl_p99 >= 0


@pytest.fixture(scope="module")
def noise():
    """Some logits, and an error of size 1."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 30, dtype=torch.float64, generator=generator)
    return truth, torch.randn(50, 30, generator=generator)


@pytest.mark.parametrize(
    ("error", "reference", "passes"),
    [(1.9e-6, 1e-6, True), (2.1e-6, 1e-6, False), (1e-4, 1e-4, False)],  # 1e-4 is over the fixed limit
)
def test_float32_may_have_twice_the_reference_s_error_up_to_a_fixed_limit(noise, error, reference, passes):
    truth, unit = noise
    known = off_by(reference * unit, truth)
    assert judge(off_by(error * unit, truth), [known], torch.float32).passed == passes


def test_the_limit_on_kl_follows_a_reference_that_is_over_it_itself(noise):
    truth, unit = noise
    assert limits([off_by(1e-7 * unit, truth)], torch.float32).kl_max == 1e-9
    far = off_by(1e-4 * unit, truth)
    assert limits([far], torch.float32).kl_max == pytest.approx(4 * far.kl_max)


def test_a_flip_passes_only_where_the_oracle_is_nearly_undecided():
    truth = torch.zeros(20, 30, dtype=torch.float64)
    truth[:, 0], truth[:, 1] = 1.0, 1.0 - 1e-6
    near = truth.clone()
    near[0, 1] += 2e-6
    reference = off_by(1e-6 * torch.ones(20, 30), truth)
    assert judge(difference(near, truth), [reference], torch.float32).passed
    truth[0, 1] = 1.0 - 2e-5
    near[0, 1] = 1.0 + 1e-5
    (failure,) = judge(difference(near, truth), [reference], torch.float32).failures[-1:]
    assert "flip" in failure


def test_comparing_finds_the_same_bits_layer_by_layer():
    model = tiny_model()
    texts = {"one": IDS, "another": IDS[:17]}
    told = []
    case = compare_runs(
        {f"transformers {name}": reference_run(model, name) for name in REFERENCES},
        {f"tinyllama {name}": kernel_run(model, kernel) for name, kernel in KERNELS.items()},
        texts,
        truths(model, texts),
        torch.float32,
        {f"tinyllama {name}": f"transformers {name}" for name in REFERENCES},
        told.append,
    )
    assert [row.same_bits for row in case.rows] == [None, None, True, True]
    assert case.failures == []
    assert case.texts == {"one": 64, "another": 17}
    assert len(told) == 8
    for theirs, ours in zip(case.rows[:2], case.rows[2:], strict=True):
        assert ours.by_layer == theirs.by_layer
        assert len(ours.by_layer) == 7  # embedding, 4 blocks, norm, logits
        assert ours.by_layer[-1] == ours.relative
        assert [len(curve) for curve in ours.by_position.values()] == [2, 1]


def test_a_row_has_its_flips_by_text_and_nan_for_stages_that_it_lacks():
    model = tiny_model()
    texts = {"one": IDS[:9], "another": IDS[:5]}
    right = kernel_run(model, eager)

    def flipped(ids, addresses):
        values = right(ids, addresses) | {"layers.1": None, "layers.2": torch.zeros(1, 64)}
        if len(ids) == 5:
            values["lm_head"][3] *= -1
        return values

    (row,) = compare_runs({}, {"flipped": flipped}, texts, truths(model, texts), torch.float32).rows
    assert [(flip.text, flip.position) for flip in row.flips] == [("another", 3)]
    assert row.flips[0].margin > 0
    assert [math.isnan(error) for error in row.by_layer] == [False, False, True, True, *[False] * 3]


def test_any_two_callables_can_be_compared():
    model = tiny_model()
    reference = reference_model(model, "eager")
    truth = oracle_logits(config_fields(model.config), model.state_dict(), IDS)
    same = compare(model, reference, IDS, truth)
    assert same.verdict.passed
    assert same.same_bits
    assert "passed" in str(same)

    def wrong(ids):
        return model(ids)[0] * 1.001  # (T, V) is as good as (1, T, V)

    off = compare(wrong, reference, IDS, truth)
    assert not off.verdict.passed
    assert off.mine.relative > 500 * off.reference.relative
    assert "FAILED" in str(off)


def test_without_a_truth_the_reference_is_the_truth():
    model, other = tiny_model(), tiny_model(attention="sdpa")
    close = compare(other, model, IDS)
    assert close.reference is None
    assert close.verdict.passed
    assert not close.same_bits
    other.set_attention(lambda q, k, v, context: eager(q, k, 1.01 * v, context))
    assert not compare(other, model, IDS).verdict.passed


def test_logits_of_another_shape_are_refused_by_name():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"mine: .*\(64, 320\).*\(64, 319\)"):
        compare(lambda ids: model(ids)[..., :-1], model, IDS)
