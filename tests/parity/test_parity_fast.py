"""The judge on the fast layers: they pass by the same criteria, and planted bugs in them do not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests.fast.compiled import compiled as needs_compiler
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager
from tinyllama.cache import KVCache
from tinyllama.checkpoints.load import load_model
from tinyllama.fast import native
from tinyllama.fast.linear import FastLinear, Int8Linear
from tinyllama.kernels import KERNELS
from tinyllama.parity.comparison import Case, compare_runs, reference_run, truths
from tinyllama.parity.divergence import Divergence, Run, bisect
from tinyllama.parity.fast import (
    Dequantised,
    dequantised,
    dequantised_reference_run,
    fast_layers,
    fast_run,
    pieces,
    products,
    swapped,
)
from tinyllama.parity.measure import INT8_LIMITS, broken, difference
from tinyllama.parity.reference import Right, reference_model
from tinyllama.parity.trace import operations, our_trace, stages

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

IDS = some_ids(1, 64)[0].tolist()
# Rows of several groups of 64.
WIDE = {"hidden_size": 128, "intermediate_size": 192}
KINDS = ("stored", "int8")


def wide_model(dtype=torch.float32, **changes):
    return tiny_model(dtype=dtype, **WIDE, **changes)


@dataclass(frozen=True)
class Judged:
    """A fast model, and what it is judged by."""

    run: Run
    right: Right
    references: dict[str, Run]

    def case(self) -> Case:
        texts = {"random ids": IDS}
        truth = truths(self.right, texts)
        return compare_runs(self.references, {"fast": self.run}, texts, truth, self.right.dtype)

    def found(self) -> Divergence | None:
        return bisect(self.run, self.right, IDS, list(self.references.values()))


def judged(kind, dtype=torch.float32, kernel=KERNELS["sdpa"], **changes):
    model = wide_model(dtype, **changes)
    products(model, kind)  # the compiled code is there, and found right
    layers = fast_layers(model, kind)
    run = fast_run(model, layers, kernel)
    if kind == "stored":
        return Judged(run, model, {name: reference_run(model, name) for name in KERNELS})
    references = {name: dequantised_reference_run(model, layers, name) for name in KERNELS}
    return Judged(run, Dequantised(model, layers), references)


# --- what is right passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("stored", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ("int8", torch.float32),
    ],
)
def test_fast_layers_pass_by_the_criteria_of_their_dtype(kind, dtype, tied):
    one = judged(kind, dtype, tie_word_embeddings=tied)
    assert one.case().failures == []
    assert one.found() is None


def test_without_compiled_code_they_pass_too(monkeypatch):
    monkeypatch.setattr(FastLinear, "uses_compiled", lambda layer, x: False)
    for kind in KINDS:
        assert judged(kind).case().failures == []


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_text_goes_through_one_product_and_half_through_the_other(kind, monkeypatch):
    vectors = set()
    right = native.linear

    def linear(weight, scales, x):
        vectors.add(x.numel() // x.shape[-1])
        return right(weight, scales, x)

    monkeypatch.setattr(native, "linear", linear)
    judged(kind).run(IDS, ["lm_head"])
    assert vectors == {33, 1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("length", [1, 2, 33, 34, 40, 64, 256, 2040])
def test_pieces_are_the_whole_text(length):
    spans = pieces(length)
    assert [at for start, end in spans for at in range(start, end)] == list(range(length))
    assert all(end - start <= 8 for start, end in spans[1:])
    if length > 66:
        assert spans[0] == (0, length // 2)


def test_values_along_the_text_are_those_of_one_pass():
    model = wide_model(torch.float64)
    addresses = [*stages(4), *operations(0), *operations(3)]
    whole = our_trace(model, IDS, addresses)
    joined = fast_run(model, {}, eager)(IDS, addresses)
    for address in addresses:
        value, expected = joined[address], whole[address]
        assert value is not None
        assert expected is not None
        if address.endswith(".scores"):
            expected = expected.masked_fill(expected < -1e300, -torch.inf)
            value = value.masked_fill(value < -1e300, -torch.inf)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_what_is_never_computed_has_no_value():
    joined = fast_run(wide_model(), {})(IDS, ["layers.0.self_attn.scores", "layers.9", "norm"])
    assert [value is None for value in joined.values()] == [True, True, False]


# --- the model is what it was ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gets_its_own_layers_back_whatever_happens(kind, tied):
    model = wide_model(tie_word_embeddings=tied)
    before, logits = list(model.named_modules()), model(torch.tensor([IDS]))
    with swapped(model, fast_layers(model, kind)):
        assert not any(isinstance(module, nn.Linear) for module in model.modules())
    with pytest.raises(ZeroDivisionError), swapped(model, fast_layers(model, kind)):
        raise ZeroDivisionError
    with pytest.raises(AttributeError), swapped(model, {"lm_head": nn.Identity(), "no.such": nn.Identity()}):
        pass
    after = list(model.named_modules())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert model.lm_head.weight.requires_grad
    assert torch.equal(model(torch.tensor([IDS])), logits)


def test_the_same_weights_are_no_copy():
    model = wide_model()
    for path, layer in fast_layers(model, "stored").items():
        assert layer.weight.data_ptr() == model.get_submodule(path).weight.data_ptr()


def test_they_are_the_layers_that_a_loaded_model_has(tmp_path):
    model = wide_model(attention="sdpa", tie_word_embeddings=True)
    reference_model(model, "eager").save_pretrained(tmp_path)
    for kind, weights in (("stored", "float32"), ("int8", "int8")):
        loaded = load_model(tmp_path, device="cpu", dtype="float32", weights=weights)
        with swapped(model, fast_layers(model, kind)):
            got, expected = model(torch.tensor([IDS])), loaded(torch.tensor([IDS]))
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_weights_of_fewer_bits_than_the_activations_are_judged_by_the_activations_criteria():
    model = wide_model(torch.bfloat16).float()
    layers = {
        path: FastLinear(layer.weight.bfloat16()) for path, layer in fast_layers(model, "stored").items()
    }
    references = {name: reference_run(model, name) for name in KERNELS}
    assert Judged(fast_run(model, layers), model, references).case().failures == []


def test_dequantised_weights_are_7_bits_times_a_scale():
    layer = Int8Linear(torch.tensor([[100] * 64 + [-3] * 64]).to(torch.int8), torch.tensor([[0.5, 3.0]]))
    assert dequantised(layer)[0].tolist() == [50.0] * 64 + [-9.0] * 64
    model = wide_model(tie_word_embeddings=True)
    right = Dequantised(model, fast_layers(model, "int8"))
    weights = right.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert len(weights) == len(model.state_dict())
    assert torch.equal(weights["embed_tokens.weight"], model.embed_tokens.weight)
    assert not torch.equal(weights["lm_head.weight"], model.embed_tokens.weight)
    torch.testing.assert_close(weights["lm_head.weight"], model.embed_tokens.weight, rtol=0, atol=1e-4)
    assert not right.config.tie_word_embeddings


# --- the gate can fail -----------------------------------------------------------------------------------


def in_product(many: bool, change: Any) -> AbstractContextManager[Any]:
    """The compiled product of what `change` makes of weight, scales and x, for many vectors or for few."""
    right = native.linear

    def linear(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
        if (x.numel() // x.shape[-1] > native.FEW) == many:
            weight, scales, x = change(weight, scales, x)
        return right(weight, scales, x)

    return patch.object(native, "linear", linear)


def neighbours_scales(weight: Tensor, scales: Tensor | None, x: Tensor) -> Any:
    return weight, None if scales is None else scales.roll(1, dims=1).contiguous(), x


def without_the_last_columns(weight: Tensor, scales: Tensor | None, x: Tensor) -> Any:
    x = x.clone()
    x[..., -64:] = 0
    return weight, scales, x


def rounded_x(weight: Tensor, scales: Tensor | None, x: Tensor) -> Any:
    return weight, scales, x.bfloat16().float()


def stale_position() -> AbstractContextManager[Any]:
    """A piece is placed where the one before it ended, less one."""
    right = KVCache.start
    return patch.object(KVCache, "start", lambda cache, T: max(right(cache, T) - 1, 0))


def neighbours_norm() -> AbstractContextManager[Any]:
    """The compiled norm of the neighbouring channels."""
    right = native.rms_norm
    return patch.object(native, "rms_norm", lambda x, weight, eps: right(x.roll(1, -1), weight, eps))


Q_PROJ = "layers.0.self_attn.q_proj"
BUGS = {
    "a scale of the wrong group": (lambda: in_product(False, neighbours_scales), Q_PROJ, ("int8",)),
    "the same for many vectors": (lambda: in_product(True, neighbours_scales), Q_PROJ, ("int8",)),
    "the last 64 columns left out": (lambda: in_product(False, without_the_last_columns), Q_PROJ, KINDS),
    "x rounded to bfloat16": (lambda: in_product(False, rounded_x), Q_PROJ, KINDS),
    "many vectors rounded to bfloat16": (lambda: in_product(True, rounded_x), Q_PROJ, KINDS),
    "a stale cache position": (stale_position, "layers.0.self_attn.q_rot", KINDS),
    "a norm of the neighbours": (neighbours_norm, "layers.0.input_layernorm", KINDS),
}
OF_MATMUL = ("the same for many vectors", "many vectors rounded to bfloat16")


@needs_compiler
@pytest.mark.parametrize(
    ("bug", "kind"), [(bug, kind) for bug, (_, _, kinds) in BUGS.items() for kind in kinds]
)
def test_a_planted_bug_in_a_fast_mode_fails_the_gate_and_is_found(bug, kind):
    one = judged(kind)
    planted, address, _ = BUGS[bug]
    with planted():
        case = one.case()
        found = one.found()
    *references, fast = case.rows
    assert any("relRMS" in failure for failure in fast.failures)
    assert fast.relative > 100 * max(row.relative for row in references)
    assert found is not None
    assert found.address == address
    # In the product that has the bug: the first pass, or the pieces.
    token = found.place[-2]
    assert bug == "a norm of the neighbours" or (token < 33) == (bug in OF_MATMUL)
    assert one.case().failures == []


def test_what_rounding_the_weights_costs_has_limits():
    generator = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(200, 300, generator=generator, dtype=torch.float64)
    ids = truth.argmax(dim=1).roll(1).tolist()  # each follows where it is the most likely
    noise = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    assert broken(difference(truth + 0.01 * noise, truth, ids), INT8_LIMITS) == ()
    failures = broken(difference(truth + 0.5 * noise, truth, ids), INT8_LIMITS)
    assert [failure.partition(" ")[0] for failure in failures] == ["KL", "top-1", "perplexity"]
    assert failures[0].endswith("is over 1.00e-02")
    assert failures[1].endswith("is under 95%")
    assert failures[2].endswith("over +1.00%")
    # Without the text nothing is known of the likelihood: where there is a limit, that is a failure.
    assert len(broken(difference(truth, truth), INT8_LIMITS)) == 1


def test_scales_of_four_bits_pass_as_a_computation_and_fail_as_a_rounding(monkeypatch):
    """What no oracle on the rounded weights can see."""

    def quantise(weight):
        groups = weight.unflatten(1, (-1, 64))
        scales = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
        return (groups / scales.float()).round().to(torch.int8).flatten(1), scales.squeeze(-1)

    monkeypatch.setattr("tinyllama.fast.linear.quantise", quantise)
    one = judged("int8")
    assert one.case().failures == []
    texts = {"random ids": IDS}
    truth = truths(wide_model(), texts)
    case = compare_runs({}, {"int8": one.run}, texts, truth, torch.float32, limit=INT8_LIMITS)
    assert any("KL mean" in failure for failure in case.failures)
    assert any("top-1" in failure for failure in case.failures)
