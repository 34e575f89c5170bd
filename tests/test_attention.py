"""The kernels: a softmax over what is visible, and nothing else."""

import pytest
import torch

from tests.shapes import some_ids, tiny_config, tiny_model
from tinyllama.attention import AttentionContext, AttentionMask, eager, sdpa
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS, kernel
from tinyllama.rope import RotaryEmbedding

kernels = pytest.mark.parametrize("attention", [eager, sdpa])
B, H, K, T, D = 2, 8, 2, 12, 16
ROTARY = RotaryEmbedding(tiny_config(head_dim=D))


def inputs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, D, generator=generator).to(dtype)
    k, v = torch.randn(2, B, K, T, D, generator=generator).to(dtype)
    return q, k, v


def context(positions, causal=False, taps=None):
    tap = (lambda x: x) if taps is None else (lambda x: taps.append(x) or x)
    mask = AttentionMask.of(positions, positions, causal, ROTARY)
    return AttentionContext(mask, D**-0.5, 0, tap, tap, range(H), H)


@kernels
@pytest.mark.parametrize("causal", [True, False])
def test_output_lies_within_the_visible_values(attention, causal):
    q, k, v = inputs()
    z = attention(q, k, v, context(torch.arange(T).expand(B, T), causal)).view(B, K, -1, T, D)
    low = v.cummin(dim=2).values[:, :, None]
    high = v.cummax(dim=2).values[:, :, None]
    assert (z >= low - 1e-6).all()
    assert (z <= high + 1e-6).all()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_that_sees_nothing_stays_finite(attention, dtype):
    q, k, v = inputs(dtype)
    positions = (torch.arange(T) - 3).clamp(min=-1).expand(B, T)
    z = attention(q, k, v, context(positions))
    assert z.isfinite().all()
    assert z.dtype == dtype


@kernels
def test_fewer_keys_are_seen_where_a_context_allows_fewer(attention):
    # Fails if a fused kernel still takes the mask for a plain triangle.
    q, k, v = inputs()
    positions = torch.arange(T).expand(B, T)
    near = (torch.arange(T)[None, :] > torch.arange(T)[:, None] - 3)[None, None]
    z = attention(q, k, v, context(positions, causal=True).where(near))
    for t in range(T):
        start = max(0, t - 2)
        window = eager(
            q[:, :, t : t + 1], k[:, :, start : t + 1], v[:, :, start : t + 1], context_of_one(t, start)
        )
        # 1e-5 is the ceiling on float32 relRMS; the values have RMS 1.
        torch.testing.assert_close(z[:, :, t : t + 1], window, atol=1e-5, rtol=0)


def context_of_one(t, start):
    """A query at position t that sees the keys from `start` on, all of them."""
    keys = torch.arange(start, t + 1).expand(B, -1)
    mask = AttentionMask(
        torch.ones(B, 1, 1, t + 1 - start, dtype=torch.bool), keys[:, -1:], keys, False, ROTARY
    )
    return AttentionContext(mask, D**-0.5, 0, lambda x: x, lambda x: x, range(H), H)


def test_the_pattern_sums_to_one_and_is_zero_where_masked():
    q, k, v = inputs()
    taps = []
    eager(q, k, v, context(torch.arange(T).expand(B, T), taps=taps))
    scores, pattern = taps
    assert scores.shape == pattern.shape == (B, H, T, T)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(B, H, T), atol=1e-6, rtol=0)
    assert (pattern.triu(diagonal=1) == 0).all()


def test_every_intermediate_has_an_address_and_taps_change_nothing():
    model, ids = tiny_model(), some_ids(1, T)
    shapes = {}

    def record(name):
        return lambda module, args, output: shapes.update({name: getattr(output, "shape", None)})

    with torch.no_grad():
        expected = model(ids)
        hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
        watched = model(ids)
        for hook in hooks:
            hook.remove()
    assert torch.equal(watched, expected)
    at = "layers.2.self_attn."
    assert shapes[at + "q_proj"] == (1, T, 64)
    assert shapes[at + "k_rot"] == (1, 2, T, 8)
    assert shapes[at + "scores"] == shapes[at + "pattern"] == (1, 8, T, T)
    assert shapes[at + "z"] == (1, 8, T, 8)
    assert shapes["layers.2.mlp.product"] == (1, T, 176)
    assert shapes["layers.2"] == shapes["norm"] == (1, T, 64)
    assert all(module.__class__.__name__ != "Tap" or not module.state_dict() for module in model.modules())


def test_a_hook_on_a_tap_replaces_the_value():
    # Uniform attention over the visible tokens: the mean of the values.
    model, ids = tiny_model(), some_ids(1, T)
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    attention = model.layers[0].self_attn
    seen = {}
    hooks = [
        attention.pattern.register_forward_hook(lambda m, a, output: uniform.expand_as(output)),
        attention.v_proj.register_forward_hook(lambda m, a, output: seen.update(v=output)),
        attention.z.register_forward_hook(lambda m, a, output: seen.update(z=output)),
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    means = seen["v"].cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(seen["z"][0, 0], means[0, :, :8])


def test_an_unknown_kernel_is_refused_by_name():
    assert set(KERNELS) == {"eager", "sdpa"}
    with pytest.raises(InputError, match=r"expected eager, sdpa, .* got 'flash'"):
        kernel("flash")
