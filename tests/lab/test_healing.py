"""Healing trains the changed layers and nothing else, and can be stopped at any step."""

import os
from collections import deque

import pytest
import torch
from safetensors.torch import save_file

from tests.shapes import some_ids, tiny_model
from tinyllama.attention import sdpa
from tinyllama.errors import InputError
from tinyllama.lab.change import Change
from tinyllama.lab.healing import Settings, heal, load_healed, save_healed
from tinyllama.lab.kernel_file import load_kernel
from tinyllama.lab.perplexity import text_nll

KERNEL = "window:size=2"
CHANGE = Change(KERNEL, load_kernel(KERNEL), (1, 3))
TEXT = (some_ids(1, 8)[0].tolist() * 8)[:60]
SETTINGS = Settings(KERNEL, (1, 3), None, "a text", batch=2, length=16, lr=1e-2)


def healed(steps, model=None, start=None, settings=SETTINGS, change=CHANGE):
    """Where it stands after the last step; None if there was none to do."""
    return (deque(heal(model or tiny_model(), change, TEXT, settings, steps, start), maxlen=1) or [None])[0]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_changed_layers_are_trained_and_the_model_is_left_as_it_was():
    model = tiny_model()
    model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = healed(2, model)
    assert set(result.weights) == {name for name in before if name.startswith(("layers.1.", "layers.3."))}
    for name, weight in result.weights.items():
        assert not torch.equal(weight, before[name]), name
    assert equal(model.state_dict(), before)
    assert [attention.kernel.__name__ for attention in model.attentions] == ["eager"] * 4
    assert [p for p in model.parameters() if not p.requires_grad] == [model.norm.weight]
    assert all(p.grad is None for p in model.parameters())


def test_meanwhile_nothing_else_is_recorded():
    # Gradients of the other layers would be computed for nothing.
    model = tiny_model()
    for result in heal(model, CHANGE, TEXT, SETTINGS, 1):
        recorded = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert recorded == set(result.weights)


def test_a_loop_that_is_left_early_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in heal(model, CHANGE, TEXT, SETTINGS, 5):
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
    # They come back with the others: to be measured, and to go on from.
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


def test_the_loss_is_that_of_the_changed_model_and_goes_down():
    # The first loss is measured before the first step: by hand, from the same windows.
    model = tiny_model()
    result = healed(30, model)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(TEXT) - 16, (2, 1), generator=generator)
    window = torch.tensor(TEXT)[starts + torch.arange(17)]
    with CHANGE.applied(model), torch.no_grad():
        rows = [text_nll(model, row.tolist(), 16) for row in window]
    assert result.losses[0] == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])


def test_healing_lowers_the_perplexity_that_the_change_raised():
    model = tiny_model()
    result = healed(30, model)
    with CHANGE.applied(model):
        changed = text_nll(model, TEXT, 16).mean()
    with Change(KERNEL, CHANGE.kernel, (1, 3), None, result.weights).applied(model):
        after = text_nll(model, TEXT, 16).mean()
    assert after < 0.5 * changed


@pytest.mark.parametrize("stopped", [1, 2, 4])
def test_going_on_from_a_file_gives_the_bits_of_one_run(tmp_path, stopped):
    path = tmp_path / "healed.safetensors"
    whole = healed(5)
    save_healed(path, healed(stopped))
    start = load_healed(path)
    assert len(start.losses) == stopped
    rest = healed(5, start=start)
    assert rest.losses == whole.losses
    assert equal(rest.weights, whole.weights)
    assert equal(rest.moments, whole.moments)


def test_nothing_is_left_to_do_at_the_last_step():
    assert healed(2, start=healed(2)) is None


def test_a_seed_is_another_order_of_the_text():
    other = Settings(KERNEL, (1, 3), None, "a text", batch=2, length=16, lr=1e-2, seed=1)
    assert healed(1).losses == healed(1).losses
    assert healed(1).losses != healed(1, settings=other).losses


def test_every_step_reads_other_windows():
    # With next to no learning rate, the loss changes with the text alone.
    still = Settings(KERNEL, (1, 3), None, "a text", batch=2, length=16, lr=1e-12)
    assert len({round(loss, 4) for loss in healed(4, settings=still).losses}) == 4


def test_a_file_keeps_what_it_was_made_by(tmp_path):
    path = tmp_path / "healed.safetensors"
    result = healed(1)
    save_healed(path, result)
    again = load_healed(path)
    assert again.settings == SETTINGS
    assert again.losses == result.losses
    assert equal(again.weights, result.weights)
    assert os.listdir(tmp_path) == ["healed.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "healed.safetensors"
    save_healed(path, healed(1))
    before = path.read_bytes()

    def full(tensors, place, metadata):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyllama.lab.healing.save_file", full)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device\)"):
        save_healed(path, healed(2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["healed.safetensors"]


@pytest.mark.parametrize("kind", ["absent", "text", "other weights", "cut short"])
def test_what_is_no_healing_is_refused(tmp_path, kind):
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


def test_weights_of_a_file_are_only_lent_to_the_model():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
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
