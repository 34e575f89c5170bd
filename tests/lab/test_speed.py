"""Speed and the cost of captures: timed in turn, on the passes that are named."""

from itertools import count

import pytest

from tests.shapes import some_ids, tiny_model
from tinyllama.attention import Tap, eager, sdpa
from tinyllama.lab.change import Change
from tinyllama.lab.clauses import breaks
from tinyllama.lab.speed import DECODED, TAP_CALLS, overhead, speeds

IDS = some_ids(1, 40)[0].tolist()


@breaks("cache")
def whole_texts_only(q, k, v, context):
    return sdpa(q, k, v, context)


def test_changes_take_turns_and_are_timed_on_the_prompt_and_single_steps():
    model, passes = tiny_model(attention="sdpa"), []

    def record(module, args, output):
        passes.append((model.attentions[0].kernel.__name__, output.shape[1]))

    hook = model.embed_tokens.register_forward_hook(record)
    changes = [Change("own", sdpa, ()), Change("eager", eager), Change("whole", whole_texts_only)]
    own, other, uncached = speeds(model, changes, IDS, 2)
    hook.remove()
    cached = [[(name, 40)] + [(name, 1)] * DECODED for name in ("sdpa", "eager")]
    assert passes == [*cached[0], *cached[1], ("whole_texts_only", 40)] * 3
    assert (own.context, own.prefill_ratio, own.decode_ratio) == (40, 1.0, 1.0)
    assert other.prefill_ratio == pytest.approx(other.prefill / own.prefill)
    assert other.decode_ratio == pytest.approx(other.decode / own.decode)
    assert (uncached.decode, uncached.decode_ratio) == (None, None)


def test_passes_and_steps_with_and_without_a_capture_take_turns():
    model, order, now = tiny_model(), [], [0.0]

    def seconds(module, args, output):
        hooked, T = bool(model.layers[0].self_attn.z._forward_hooks), output.shape[1]
        order.append((T, hooked))
        usual = {(20, False): 4.0, (20, True): 5.0, (1, False): 2.0, (1, True): 3.0}[T, hooked]
        now[0] += 100.0 if len(order) <= 4 else usual  # the first round is slow

    hook = model.norm.register_forward_hook(seconds)
    cost = overhead(model, ["layers.*.self_attn.z"], IDS[:20], 3, clock=lambda: now[0])
    hook.remove()
    assert order == [(20, False), (1, False), (20, True), (1, True)] * 4
    assert (cost.plain, cost.watched, cost.plain_step, cost.watched_step) == (4.0, 5.0, 2.0, 3.0)
    assert cost.captured == 4 * 8 * 20 * 8 * 4  # layers, heads, tokens, numbers, bytes
    assert not any(module._forward_hooks for module in model.modules())


def test_every_tap_of_the_model_is_counted():
    model, ticks = tiny_model(), count()
    taps = sum(isinstance(module, Tap) for module in model.modules())
    assert taps == 4 * 6  # q_rot, k_rot, scores, pattern, z, and the MLP's product
    cost = overhead(model, ["norm"], IDS[:4], 1, clock=lambda: float(next(ticks)))
    assert cost.taps == taps * 1.0 / TAP_CALLS
