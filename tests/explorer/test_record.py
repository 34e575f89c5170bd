"""What is recorded is what the model computed, and the lines are those that ran."""

from __future__ import annotations

import linecache
import sys

import pytest
import torch

import tinyllama
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager
from tinyllama.explorer import record
from tinyllama.explorer.lines import watched
from tinyllama.explorer.recording import PART
from tinyllama.lab.kernel_file import load_kernel

pytestmark = pytest.mark.usefixtures("no_grad")
IDS = some_ids(1, 20)[0].tolist()


def captured(model, ids):
    """Every value of a pass, by eager attention."""
    model.set_attention(eager)
    with tinyllama.capture(model, "*", "layers.*", "layers.*.*", "layers.*.*.*") as values:
        model(torch.tensor([ids]))
    return dict(values)


def test_a_recording_holds_what_capture_gives():
    model = tiny_model(attention="sdpa")
    recording = record(model, IDS)
    one, values = recording.passes[0], captured(model, IDS)
    for n in range(4):
        assert torch.equal(one.streams[n + 1], values[f"layers.{n}"])
        assert torch.equal(one.z[n], values[f"layers.{n}.self_attn.z"])
        assert torch.equal(one.mlps[n], values[f"layers.{n}.mlp"])
        assert torch.equal(one.middles[n], one.streams[n] + values[f"layers.{n}.self_attn"])
        assert torch.equal(one.pattern(n), values[f"layers.{n}.self_attn.pattern"][0])
    assert torch.equal(one.logits, values["lm_head"][0, -1])


@pytest.mark.parametrize("layer", [0, 3])
def test_the_values_of_the_lines_are_what_capture_gives(layer):
    model = tiny_model()
    trace = record(model, IDS).passes[0].trace(layer)
    values = captured(model, IDS)
    seen = {name: value for step in trace.steps for name, value in step.values.items()}
    for name in ("q_proj", "q_rot", "k_rot", "pattern", "z", "o_proj", "gate_proj", "product", "mlp"):
        address = next(at for at in values if at.startswith(f"layers.{layer}.") and at.endswith(name))
        assert torch.equal(seen[name], values[address]), name
    last = [step for step in trace.steps if trace.calls[step.call].name == "Block.forward"][-1]
    assert torch.equal(last.values["return"], values[f"layers.{layer}"])


def test_the_lines_are_those_that_ran_in_their_order():
    trace = record(tiny_model(), IDS).passes[0].trace(1)
    names = [trace.calls[step.call].name.removesuffix(".forward") for step in trace.steps]
    order = [name for n, name in enumerate(names) if n == 0 or names[n - 1] != name]
    q_k_v = ["Attention", "Attention.split_heads"] * 3
    kernel = ["eager", "repeat_kv", "eager", "masked_softmax"]
    attention = [*q_k_v, "Attention", "rotate", "Attention", "KVCache.write", "Attention", *kernel]
    assert order == [
        *["Block", "RMSNorm", *attention, "Attention", "check_result", "Attention"],
        *["Block", "RMSNorm", "MLP"],
    ]
    called = trace.steps[trace.calls[trace.steps[names.index("masked_softmax")].call].caller]
    assert "masked_softmax(" in linecache.getline(trace.calls[called.call].file, called.line)


def test_a_step_is_recorded_as_the_model_computes_it():
    model = tiny_model()
    recording = record(model, IDS)
    cache = model.new_cache(1, 64)
    model(torch.tensor([IDS]), cache)
    for id in (5, 9):
        expected = model(torch.tensor([[id]]), cache)
        recording.extend(id)
        assert torch.equal(recording.passes[-1].logits, expected[0, -1])
    assert [one.start for one in recording.passes] == [0, 20, 21]
    step = recording.passes[1].trace(2)
    shapes = {name: tuple(value.shape) for one in step.steps for name, value in one.values.items()}
    assert shapes["scores"] == (1, 8, 1, 21)


def test_a_long_text_is_read_in_parts_and_gives_the_same():
    model = tiny_model(max_position_embeddings=1024)
    ids = some_ids(1, PART + 40)[0].tolist()
    recording = record(model, ids)
    assert [one.start for one in recording.passes] == [0, PART]
    torch.testing.assert_close(recording.passes[-1].logits, model(torch.tensor([ids]))[0, -1])
    whole = captured(model, ids)["layers.2.self_attn.pattern"][0]
    got = recording.passes[1].pattern(2)
    torch.testing.assert_close(got, whole[:, PART:])
    surprise = torch.cat([one.surprise for one in recording.passes])[:-1]
    log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    torch.testing.assert_close(surprise, -log_p[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])


def test_a_pattern_that_was_not_kept_is_computed_again(monkeypatch):
    monkeypatch.setattr("tinyllama.explorer.recording.KEPT_NUMBERS", 0)
    model = tiny_model()
    recording = record(model, IDS)
    assert recording.passes[0].patterns == {}
    assert torch.equal(recording.passes[0].pattern(1), captured(model, IDS)["layers.1.self_attn.pattern"][0])


def test_a_kernel_of_the_user_is_stepped_through(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from tinyllama import eager\n\n\ndef mine(q, k, v, context):\n"
        "    louder = 2 * q\n    return eager(louder, k, v, context)\n"
    )
    model = tiny_model()
    model.set_attention(load_kernel(f"{path}:mine"), layers=[2])
    recording = record(model, IDS)
    trace = recording.passes[0].trace(2)
    steps = [step for step in trace.steps if trace.calls[step.call].file == str(path)]
    assert [step.line for step in steps] == [5, 6]
    assert torch.equal(steps[0].values["louder"], 2 * trace.calls[steps[0].call].arguments["q"])
    others = [call.file for call in recording.passes[0].trace(1).calls]
    assert str(path) not in others


def test_watching_leaves_the_model_and_other_tracers_as_they_were():
    model = tiny_model(attention="sdpa")
    before, kernels = model(torch.tensor([IDS])), [one.kernel for one in model.attentions]
    heard = []

    def other(frame, event, value):
        heard.append(frame.f_code.co_name)

    sys.settrace(other)
    try:
        recording = record(model, IDS)
        recording.passes[0].trace(0)
        assert sys.gettrace() is other
    finally:
        sys.settrace(None)
    assert "masked_softmax" in heard
    assert [one.kernel for one in model.attentions] == kernels
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(torch.tensor([IDS])), before)


def test_a_failing_line_ends_the_watching(tmp_path):
    def fails():
        value = torch.ones(1)
        raise ValueError(f"no {value}")

    with pytest.raises(ValueError, match="no"), watched([__file__]) as trace:
        fails()
    assert sys.gettrace() is None
    assert torch.equal(trace.steps[0].values["value"], torch.ones(1))


def test_a_text_that_does_not_fit_is_refused():
    model = tiny_model()
    with pytest.raises(tinyllama.InputError, match="one token at least"):
        record(model, [])
    with pytest.raises(tinyllama.InputError, match="300 tokens, the context 256"):
        record(model, [1] * 300)
    recording = record(model, IDS, capacity=1)
    recording.extend(3)
    with pytest.raises(tinyllama.InputError, match="do not fit"):
        recording.extend(3)
    assert len(recording.ids) == 21
    assert len(recording.passes) == 2
