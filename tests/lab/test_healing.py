"""Healing trains the changed layers and nothing else, and can be stopped and resumed at any step."""

import json
import os
from collections import deque
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from tests.shapes import some_ids, tiny_model
from tinyllama.attention import sdpa
from tinyllama.errors import InputError
from tinyllama.lab.change import Change
from tinyllama.lab.healed import KEY, Settings, load_healed, save_healed
from tinyllama.lab.healing import heal
from tinyllama.lab.kernel_file import load_kernel
from tinyllama.lab.perplexity import text_nll

KERNEL = "window:size=2"
CHANGE = Change(KERNEL, load_kernel(KERNEL), (1, 3))
TEXT = (some_ids(1, 8)[0].tolist() * 8)[:60]
SETTINGS = Settings(KERNEL, (1, 3), None, "a text", batch=2, length=16, lr=1e-2)


def healed(steps, model=None, start=None, settings=SETTINGS, change=CHANGE):
    """The state after the last step; None if there was no step to do."""
    return (deque(heal(model or tiny_model(), change, TEXT, settings, steps, start), maxlen=1) or [None])[0]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_only_the_changed_layers_are_trained_and_the_model_is_left_as_it_was():
    model = tiny_model()
    model.norm.weight.requires_grad_(False)
    before = copied(model)
    result = healed(2, model)
    assert set(result.weights) == {name for name in before if name.startswith(("layers.1.", "layers.3."))}
    for name, weight in result.weights.items():
        assert not torch.equal(weight, before[name]), name
    assert equal(model.state_dict(), before)
    assert [attention.kernel.__name__ for attention in model.attentions] == ["eager"] * 4
    assert [p for p in model.parameters() if not p.requires_grad] == [model.norm.weight]
    assert all(p.grad is None for p in model.parameters())


def test_a_loop_that_is_left_early_leaves_the_model_as_it_was():
    model = tiny_model()
    before = copied(model)
    for result in heal(model, CHANGE, TEXT, SETTINGS, 5):
        # Gradients of the other layers would be computed for nothing.
        recorded = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert recorded == set(result.weights)
        break
    assert equal(model.state_dict(), before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_kernels_own_weights_are_trained_too():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, q, k, v, context):
            return self.factor * sdpa(q, k, v, context)

    name = "layers.1.self_attn.kernel.factor"
    result = healed(2, change=Change("scaled", Scaled(), (1,)))
    factor = result.weights[name].clone()
    assert factor != 1
    # They are saved with the others: to be measured, and to resume from.
    model, kernel = tiny_model(), Scaled()
    with Change("scaled", kernel, (1,), None, result.weights).applied(model):
        assert kernel.factor == factor
    assert kernel.factor == 1
    assert name not in model.state_dict()
    more = healed(4, model, start=result, change=Change("scaled", Scaled(), (1,)))
    assert more.losses == healed(4, change=Change("scaled", Scaled(), (1,))).losses


def test_weights_of_another_model_are_refused():
    result = healed(1)
    for other in (tiny_model(num_hidden_layers=2), tiny_model(intermediate_size=64)):
        before = [attention.kernel for attention in other.attentions]
        change = Change(KERNEL, CHANGE.kernel, (1,), None, result.weights)
        with (
            pytest.raises(InputError, match="use the one that the weights were trained in"),
            change.applied(other),
        ):
            pytest.fail("entered")
        with pytest.raises(InputError, match="use the one that the weights were trained in"):
            healed(2, other, start=result, change=Change(KERNEL, CHANGE.kernel, (1,)))
        assert [attention.kernel for attention in other.attentions] == before


def test_the_loss_is_that_of_the_changed_model_and_healing_lowers_the_perplexity():
    # The first loss is measured before the first step: here from the same windows, by text_nll.
    model = tiny_model()
    result = healed(30, model)
    starts = torch.randint(len(TEXT) - 16, (2, 1), generator=torch.Generator().manual_seed(0))
    window = torch.tensor(TEXT)[starts + torch.arange(17)]
    with CHANGE.applied(model), torch.no_grad():
        rows = [text_nll(model, row.tolist(), 16) for row in window]
        changed = text_nll(model, TEXT, 16).mean()
    assert result.losses[0] == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])
    with Change(KERNEL, CHANGE.kernel, (1, 3), None, result.weights).applied(model):
        assert text_nll(model, TEXT, 16).mean() < 0.5 * changed


@pytest.mark.parametrize("stopped", [1, 4])
def test_a_run_resumed_from_a_file_gives_the_bits_of_one_run_in_one_go(tmp_path, stopped):
    path = tmp_path / "healed.safetensors"
    whole, part = healed(5), healed(stopped)
    save_healed(path, part)
    start = load_healed(path)
    assert os.listdir(tmp_path) == ["healed.safetensors"]
    assert (start.settings, start.losses) == (SETTINGS, part.losses)
    assert equal(start.weights, part.weights)
    rest = healed(5, start=start)
    assert rest.losses == whole.losses
    assert equal(rest.weights, whole.weights)
    assert equal(rest.moments, whole.moments)
    assert healed(stopped, start=start) is None  # nothing is left to do


def test_a_seed_decides_the_windows_and_every_step_reads_others():
    # With hardly any learning rate, the loss changes with the text alone.
    still = replace(SETTINGS, lr=1e-12)
    losses = healed(4, settings=still).losses
    assert losses == healed(4, settings=still).losses
    assert len({round(loss, 4) for loss in losses}) == 4
    assert losses != healed(4, settings=replace(still, seed=1)).losses


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "healed.safetensors"
    save_healed(path, healed(1))
    before = path.read_bytes()

    def full(tensors, place, metadata):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyllama.lab.healed.save_file", full)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device\)"):
        save_healed(path, healed(2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["healed.safetensors"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", [True]),
        ("layers", "all"),
        ("layers", [[[1]]]),
        ("heads", 3),
        ("kernel", None),
        ("kernel", ["window"]),
        ("batch", "4"),
        ("length", 1e300),
        ("lr", None),
        ("seed", None),
        ("text", 0),
        ("unknown", 1),
    ],
)
def test_settings_that_nobody_would_write_are_refused(tmp_path, name, value):
    path = tmp_path / "h.safetensors"
    record = {"settings": asdict(SETTINGS) | {name: value}, "losses": [1.0]}
    save_file({"weights.x": torch.zeros(2)}, path, {KEY: json.dumps(record)})
    with pytest.raises(InputError, match=r"expected a file that heal\.py wrote"):
        load_healed(path)


@pytest.mark.parametrize(
    ("record", "tensor"),
    [
        ("null", "weights.x"),
        ("[" * 100_000, "weights.x"),
        ('{"settings": {}, "losses": []}', "weights.x"),
        ('{"settings": "window", "losses": []}', "weights.x"),
        (json.dumps({"settings": asdict(SETTINGS), "losses": None}), "weights.x"),
        (json.dumps({"settings": asdict(SETTINGS), "losses": ["x"]}), "weights.x"),
        (json.dumps({"settings": asdict(SETTINGS), "losses": [1.0]}), "gradients.x"),
    ],
)
def test_a_record_that_nobody_would_write_is_refused(tmp_path, record, tensor):
    path = tmp_path / "h.safetensors"
    save_file({tensor: torch.zeros(2)}, path, {KEY: record})
    with pytest.raises(InputError, match=r"expected a file that heal\.py wrote"):
        load_healed(path)


def test_moments_that_do_not_fit_are_refused_before_a_step():
    result = healed(1)
    name = next(iter(result.weights))
    for moments in (
        {f"{name}.exp_avg": result.weights[name]},
        {f"{name}.{one}": torch.zeros(1) for one in ("exp_avg", "exp_avg_sq")},
    ):
        with pytest.raises(InputError, match=name):
            healed(2, start=replace(result, moments=moments))


@pytest.mark.parametrize("kind", ["absent", "text", "other weights", "cut short"])
def test_another_file_is_refused(tmp_path, kind):
    path = tmp_path / "file.safetensors"
    if kind == "text":
        path.write_text("not weights at all")
    elif kind == "other weights":
        save_file({"x": torch.zeros(2)}, path)
    elif kind == "cut short":
        save_healed(path, healed(1))
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"expected a file that heal\.py wrote"):
        load_healed(path)


def test_a_change_with_weights_is_undone_whatever_happens():
    model = tiny_model()
    before = copied(model)
    change = Change(KERNEL, CHANGE.kernel, (1, 3), None, healed(1).weights)
    with change.applied(model):
        assert not equal(model.state_dict(), before)
    assert equal(model.state_dict(), before)
    with pytest.raises(ZeroDivisionError), change.applied(model):
        raise ZeroDivisionError
    assert equal(model.state_dict(), before)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="expected more than 16 tokens to learn from, got 16"):
        next(heal(tiny_model(), CHANGE, TEXT[:16], SETTINGS, 1))
