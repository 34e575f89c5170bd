"""What reading values costs: measured in turn, on the passes that it says."""

from tests.shapes import some_ids, tiny_model
from tinyllama.attention import Tap
from tinyllama.lab import overhead as measured
from tinyllama.lab.overhead import overhead

IDS = some_ids(1, 20)[0].tolist()


def test_passes_and_steps_with_and_without_a_capture_take_turns(monkeypatch):
    model, order = tiny_model(), []

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls):
            return cls.now

    def seconds(module, args, output):
        hooked = bool(model.layers[0].self_attn.z._forward_hooks)
        T = output.shape[1]
        order.append((T, hooked))
        # The first round is slow; then each kind takes its own time.
        Clock.now += (
            100.0
            if len(order) <= 4
            else {(20, False): 4.0, (20, True): 5.0, (1, False): 2.0, (1, True): 3.0}[T, hooked]
        )

    monkeypatch.setattr(measured, "time", Clock)
    hook = model.norm.register_forward_hook(seconds)
    cost = overhead(model, ["layers.*.self_attn.z"], IDS, 3)
    hook.remove()
    assert order == [(20, False), (1, False), (20, True), (1, True)] * 4
    assert (cost.plain, cost.watched, cost.plain_step, cost.watched_step) == (4.0, 5.0, 2.0, 3.0)
    assert cost.captured == 4 * 8 * 20 * 8 * 4  # layers, heads, tokens, numbers, bytes
    assert not any(module._forward_hooks for module in model.modules())


def test_every_tap_of_the_model_is_counted(monkeypatch):
    calls = []
    monkeypatch.setattr(Tap, "forward", lambda self, x: calls.append(1) or x)
    model = tiny_model()
    taps = sum(isinstance(module, Tap) for module in model.modules())
    assert taps == 4 * 6  # q_rot, k_rot, scores, pattern, z, and the MLP's product
    ticks = iter(range(100))
    monkeypatch.setattr(measured.time, "perf_counter", lambda: float(next(ticks)))
    assert measured._taps(model) == taps * 1.0 / measured.CALLS
    assert len(calls) == measured.CALLS
