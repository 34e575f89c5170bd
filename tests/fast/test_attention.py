"""Compiled attention against float64, and the kernel that hands over to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fast.compiled import FLAGS, compiled, needs
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import AttentionContext, AttentionMask, sdpa
from tinyllama.fast import attention, build, native
from tinyllama.fast.attention import compiled_sdpa
from tinyllama.rope import RotaryEmbedding

pytestmark = [compiled, pytest.mark.usefixtures("one_thread", "no_grad")]
# relRMS: float32's sums over up to 200 keys, bfloat16's rounding of the result and of the weights.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
MANY = native.FEW + 5  # tokens that go through in panels, and not in whole ones


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    for dtype in native.ACTIVATIONS:
        assert attention.claim(dtype).check(wait=120)


def drawn(B: int, T: int, K: int, G: int, D: int, past: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, and keys and values that are a part of a larger cache."""
    random = torch.Generator().manual_seed(B * T + K * G + D + past)
    q = torch.randn(B, T, K * G, D, generator=random).transpose(1, 2)
    k, v = (torch.randn(B, K, 1 + past + T + 3, D, generator=random) for _ in range(2))
    return q.to(dtype), k.to(dtype)[:, :, 1 : 1 + past + T], v.to(dtype)[:, :, 1 : 1 + past + T]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    T, S = q.shape[2], k.shape[2]
    G = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(G, dim=1) for x in (k, v))
    ahead = torch.ones(T, S).triu(S - T + 1).bool()
    return (q.double() @ k.transpose(2, 3) * scale).masked_fill(ahead, -torch.inf).softmax(-1) @ v


def assert_attends(q: Tensor, k: Tensor, v: Tensor, **how: bool) -> None:
    z, right = native.attend(q, k, v, 0.125, **how), exact(q, k, v, 0.125)
    assert z.dtype == q.dtype
    assert (z.double() - right).norm() <= LIMITS[q.dtype] * right.norm()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", native.ACTIVATIONS)
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 5, 32, 33, 70]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([16, 48, 64, 128]),
    st.sampled_from([0, 1, 2, 61, 62, 63, 64, 65, 130]),
)
def test_it_is_causal_attention(dtype, plain: bool, B: int, T: int, K: int, G: int, D: int, past: int):
    assert_attends(*drawn(B, T, K, G, D, past, dtype), plain=plain)


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
@pytest.mark.parametrize("dtype", native.ACTIVATIONS)
def test_the_code_for_every_kind_of_processor_attends_alike(flags, dtype: torch.dtype, monkeypatch):
    needs(flags)
    one = build.attention(dtype)
    other = build.Build(one.sources, one.defines, flags)
    assert other.ready(wait=120)
    monkeypatch.setattr(build, "attention", lambda dtype: other)
    for T in (3, MANY):
        assert_attends(*drawn(1, T, 2, 4, 64, 70, dtype))


@pytest.mark.parametrize("T", [1, MANY])
def test_scores_of_any_size_have_a_softmax(T: int):
    q, k, v = drawn(1, T, 1, 2, 64, 200, torch.float32)
    k[:, :, 190] *= 100
    assert_attends(30 * q, k, v)  # the last block may hold the largest score
    assert_attends(torch.full_like(q, 10.0), torch.full_like(k, -10.0), v)  # all far below zero


@pytest.mark.parametrize("dtype", native.ACTIVATIONS)
def test_a_token_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(dtype: torch.dtype):
    # So a checked guess gives the id of a plain step.
    q, k, v = drawn(1, 6, 2, 4, 64, 130, dtype)
    S = k.shape[2]
    parts = [
        native.attend(q[:, :, t : t + 1], k[:, :, : S - 5 + t], v[:, :, : S - 5 + t], 0.125) for t in range(6)
    ]
    many_q, many_k, many_v = drawn(2, 3 * MANY, 2, 4, 64, 130, dtype)
    alone = native.attend(many_q, many_k, many_v, 0.125)
    torch.set_num_threads(2)
    assert torch.equal(native.attend(q, k, v, 0.125), torch.cat(parts, dim=2))
    assert torch.equal(native.attend(many_q, many_k, many_v, 0.125), alone)


@pytest.mark.parametrize("dtype", native.ACTIVATIONS)
@pytest.mark.parametrize("T", [1, MANY])
def test_nan_is_not_lost(T: int, dtype: torch.dtype):
    for where in range(3):
        given = drawn(1, T, 1, 1, 64, 10, dtype)
        given[where][..., 3] = torch.nan
        q, k, v = given
        assert native.attend(q, k, v, 0.125).isnan().any(-1).all()


@pytest.mark.parametrize("dtype", native.ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 2, MANY, MANY + 1])
def test_slots_around_the_keys_are_not_read(T: int, dtype: torch.dtype):
    q, *held = drawn(1, T, 1, 2, 64, 10, dtype)
    cache = [torch.full((1, 1, 1 + x.shape[2] + 70, 64), torch.nan, dtype=dtype) for x in held]
    views = [whole[:, :, 1 : 1 + x.shape[2]].copy_(x) for whole, x in zip(cache, held, strict=True)]
    assert_attends(q, *views)


def test_what_does_not_fit_is_refused_before_it_reaches_c():
    q, k, v = (torch.zeros(1, 4, 8, 64) for _ in range(3))
    for bad in (
        (q, k[:, :3], v[:, :3]),
        (q, k[:, :, :7], v[:, :, :7]),  # more queries than keys
        (q, k, v[:, :2]),
        (q[..., :40], k[..., :40], v[..., :40]),  # D is no multiple of 16
        (q[0], k[0], v[0]),
        (q.double(), k.double(), v.double()),
        (q, k.bfloat16(), v),
        (q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)),
        (q.to("meta"), k, v),
        (torch.cat([q, q]), k, v),
        (torch.zeros(1, 65, 1, 16), torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)),
    ):
        with pytest.raises(ValueError, match="cannot attend"):
            native.attend(*bad, 0.125)


def context(T: int, S: int, causal: bool = True) -> AttentionContext:
    keys = torch.arange(S)[None]
    rotary = RotaryEmbedding(tiny_model().config)
    mask = AttentionMask.of(keys[:, S - T :], keys, causal, rotary)
    return AttentionContext(mask, 0.125, 0, lambda x: x, lambda x: x)


def counted(monkeypatch) -> list[int]:
    """Grows by one with each call of the compiled code."""
    calls: list[int] = []
    attend = native.attend

    def counting(q, k, v, scale):
        calls.append(1)
        return attend(q, k, v, scale)

    monkeypatch.setattr(native, "attend", counting)
    return calls


def test_the_kernel_uses_it_for_causal_attention_alone(monkeypatch):
    calls = counted(monkeypatch)
    q, k, v = drawn(1, 3, 2, 2, 64, 5, torch.float32)
    plain, narrowed = context(3, 8), context(3, 8).where(torch.ones(1, 1, 3, 8, dtype=torch.bool))
    expected = sdpa(q, k, v, plain)
    torch.testing.assert_close(compiled_sdpa(q, k, v, plain), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1
    torch.testing.assert_close(compiled_sdpa(q, k, v, narrowed), expected, atol=1e-5, rtol=1e-5)
    compiled_sdpa(q.half(), k.half(), v.half(), plain)
    with torch.enable_grad():
        compiled_sdpa(q.requires_grad_(), k, v, plain).sum().backward()
    assert q.grad is not None
    assert len(calls) == 1


def test_a_model_s_chunks_steps_and_batches_are_those_of_sdpa(monkeypatch):
    calls = counted(monkeypatch)
    model, ids = tiny_model(attention="sdpa", head_dim=16), some_ids(2, 48)
    expected = model(ids)
    model.set_attention(compiled_sdpa)
    cache, parts = model.new_cache(2, 48), []
    for start, end in ((0, 40), (40, 41), (41, 48)):
        parts.append(model(ids[:, start:end], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 3 * len(model.layers)
    padded = torch.tensor([[-1, 0, 1], [0, 1, 2]])
    model(ids[:, :3], model.new_cache(2, 3), padded)  # rows of different lengths need the mask
    assert len(calls) == 3 * len(model.layers)
