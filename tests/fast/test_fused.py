"""Fused norms, MLPs and attentions, and step.c under them, against float64 and against their base classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.shapes import TINY, some_ids
from tinyllama.attention import eager
from tinyllama.cache import KVCache
from tinyllama.checkpoints.config_file import config_from_dict
from tinyllama.fast import native
from tinyllama.fast.fused import FUSED, FusedAttention, fuse
from tinyllama.fast.linear import FastLinear
from tinyllama.fast.split_linear import Linear
from tinyllama.generation import prefill
from tinyllama.hooks import capture, patch
from tinyllama.model import Block, Llama
from tinyllama.parity.fast import fast_layers
from tinyllama.parity.fixture import unit_gain_
from tinyllama.rope import rotate

compiled = pytest.mark.skipif(not native.available(), reason="needs gcc")
pytestmark = [compiled, pytest.mark.usefixtures("one_thread")]
DTYPES = (torch.float32, torch.bfloat16)
# Half a unit in the last place for each of a few roundings.
UNIT = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7}
# Tokens that go through the way for many of them, and not in whole panels.
MANY = 37
FLAGS = [(), ("-O3",), ("-O3", "-mavx2", "-mfma", "-mf16c"), ("-O1", "-march=native")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forget() -> None:
    for function in (native._operation, native._library):
        function.cache_clear()


@pytest.fixture(params=FLAGS, ids=" ".join)
def processor(request, monkeypatch):
    """Code for the machine's widest registers, for others, and for none in particular."""
    if request.param:
        if "-mavx2" in request.param and "avx2" not in native.CPUINFO.read_text():
            pytest.skip("this machine has no AVX2")
        monkeypatch.setattr(native, "FLAGS", (*request.param, "-fPIC", "-fopenmp"))
        forget()
    yield
    if request.param:
        forget()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (3, 100), (40, 576), (0, 64)])
def test_the_norm_is_rms_norm(processor, shape: tuple[int, ...], dtype: torch.dtype):
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype)
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    y = native.rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= exact.abs() * UNIT[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 5632, 40_000])
def test_swiglu_is_silu_of_gate_times_up(processor, n: int, dtype: torch.dtype):
    gate, up = (20 * random(n)).to(dtype), random(n, seed=1).to(dtype)
    exact = F.silu(gate.double()) * up.double()
    y = native.swiglu(gate, up)
    # Below, e^x is cut off; such a product is nothing beside any other.
    assert ((y.double() - exact).abs() <= exact.abs() * UNIT[dtype] + 1e-30).all()


def test_results_are_rounded_to_the_nearest_bfloat16():
    # silu(64) is 64, so this is a product of two bfloat16 numbers, exact before it is rounded; many are ties.
    up = torch.arange(1, 257).bfloat16().repeat(3)
    gate = torch.tensor([64.0, 65.0, 67.5]).bfloat16().repeat_interleave(256)
    exact = gate.float() * up.float()
    assert torch.equal(native.swiglu(gate, up), exact.bfloat16())
    assert (exact.view(torch.int32) & 0xFFFF == 0x8000).sum() > 10


def attention(q, k, v, cos, sin, positions, keys, values) -> Tensor:
    """In float64, token by token; keys and values as they are after the write."""
    (B, T), (_, K, _, D) = positions.shape, keys.shape
    turned = rotate(q.double().view(B, T, -1, D).transpose(1, 2), cos.double(), sin.double())  # (B, H, T, D)
    H = turned.shape[1]
    z = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            S = int(positions[b, t]) + 1
            for h in range(H if S else 0):
                g = h * K // H
                scores = keys[b, g, :S].double() @ turned[b, h, t] / math.sqrt(D)
                z[b, t, h] = scores.softmax(0) @ values[b, g, :S].double()
    return z


def drawn(B: int, T: int, K: int, G: int, D: int, past: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (random(B, T, heads * D, seed=seed).to(dtype) for seed, heads in ((1, K * G), (2, K), (3, K)))
    positions = torch.arange(past, past + T).repeat(B, 1)
    angles = random(B, 1, T, D // 2, seed=4)
    keys, values = (random(B, K, past + T + 1, D, seed=seed).to(dtype) for seed in (5, 6))
    return q, k, v, angles.cos().to(dtype), angles.sin().to(dtype), positions, keys, values


def assert_attends(given: tuple[Tensor, ...]) -> None:
    dtype = given[0].dtype
    z = native.attend(*given)
    exact = attention(*given)
    assert z.dtype == dtype
    assert (z.double() - exact).norm() <= {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 5, 32, 33, 70]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([16, 48, 64, 128]),
    st.sampled_from([0, 1, 2, 61, 62, 63, 64, 65, 130]),
)
def test_it_is_attention_after_rope(dtype: torch.dtype, B: int, T: int, K: int, G: int, D: int, past: int):
    assert_attends(drawn(B, T, K, G, D, past, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_processor_attends_alike(processor, dtype: torch.dtype):
    for T in (3, MANY):
        assert_attends(drawn(1, T, 2, 4, 64, 70, dtype))


@pytest.mark.parametrize("T", [1, MANY])
def test_large_scores_do_not_overflow_and_the_last_block_may_hold_the_largest(T: int):
    q, *rest, keys, values = drawn(1, T, 1, 2, 64, 200, torch.float32)
    keys[:, :, 190] *= 100
    assert_attends((30 * q, *rest, keys, values))


@pytest.mark.parametrize("T", [1, MANY])
def test_scores_that_are_all_far_below_zero_have_a_softmax_too(T: int):
    q, k, v, cos, sin, positions, keys, values = drawn(1, T, 1, 1, 64, 100, torch.float32)
    q[:], k[:], keys[:] = 10, -10, -10 - keys.abs()  # keys: in the last block, too
    cos[:], sin[:] = 1, 0
    given = (q, k, v, cos, sin, positions, keys, values)
    assert (attention(*given) != 0).all()
    assert_attends(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_keys_and_values_go_to_their_slots_and_nothing_else_changes(dtype: torch.dtype):
    q, k, v, cos, sin, positions, keys, values = drawn(2, 3, 2, 2, 64, 5, dtype)
    positions[1] = torch.tensor([-1, 0, 1])  # a shorter row, padded on the left
    before_keys, before_values = keys.clone(), values.clone()
    z = native.attend(q, k, v, cos, sin, positions, keys, values)
    turned = rotate(k.double().view(2, 3, 2, 64).transpose(1, 2), cos.double(), sin.double())
    for b, slots in ((0, [5, 6, 7]), (1, [0, 1])):
        difference = (keys[b, :, slots].double() - turned[b, :, -len(slots) :]).abs()
        assert (difference <= 4 * UNIT[dtype]).all()  # of two products of numbers below 4
        assert torch.equal(values[b, :, slots], v.view(2, 3, 2, 64).transpose(1, 2)[b, :, -len(slots) :])
        before_keys[b, :, slots], before_values[b, :, slots] = keys[b, :, slots], values[b, :, slots]
    assert torch.equal(keys, before_keys)
    assert torch.equal(values, before_values)
    assert (z[1, 0] == 0).all()
    assert (z[1, 1:] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_may_begin_with_padding(dtype: torch.dtype):
    q, k, v, cos, sin, _, keys, values = drawn(2, MANY + 5, 2, 3, 64, 0, dtype)
    positions = torch.stack([torch.arange(MANY + 5), torch.arange(-5, MANY).clamp(min=-1)])
    given = (q, k, v, cos, sin, positions, keys, values)
    unwritten = keys[1, :, MANY:].clone()
    assert_attends(given)
    assert torch.equal(keys[1, :, MANY:], unwritten)
    assert (native.attend(*given)[1, :5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(dtype: torch.dtype):
    # So that a checked guess gives the id that it would have given as a step.
    q, k, v, cos, sin, positions, keys, values = drawn(1, 6, 2, 4, 64, 130, dtype)
    parts = []
    for t in range(6):
        at = slice(t, t + 1)
        now = [x[:, at].contiguous() for x in (q, k, v)]
        now += [x[:, :, at].contiguous() for x in (cos, sin)]
        given = (*now, positions[:, at].contiguous(), keys, values)
        parts.append(native.attend(*given))
    torch.set_num_threads(2)
    assert torch.equal(native.attend(q, k, v, cos, sin, positions, keys, values), torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, MANY, MANY + 1])
def test_what_slots_hold_that_no_token_has_written_is_not_read(T: int, dtype: torch.dtype):
    given = drawn(1, T, 1, 2, 64, 10, dtype)
    for held in given[-2:]:
        held[:, :, 10 + T :] = torch.nan
    assert_attends(given)


@pytest.mark.parametrize("T", [5, MANY])
def test_tokens_may_come_in_any_order(T: int):
    q, k, v, cos, sin, positions, keys, values = drawn(1, T, 2, 4, 64, 20, torch.float32)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    assert_attends((q, k, v, cos, sin, positions[:, order].contiguous(), keys, values))


@pytest.mark.parametrize("T", [5, MANY])
def test_a_later_token_s_large_score_takes_nothing_from_those_before(T: int):
    q, k, v, cos, sin, positions, keys, values = drawn(1, T, 1, 2, 64, 0, torch.float32)
    q[:], cos[:], sin[:] = 1, 1, 0
    k[:, -1] = 1000
    assert_attends((q, k, v, cos, sin, positions, keys, values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_have_the_same_bits_on_any_number_of_threads(dtype: torch.dtype):
    given = drawn(2, 3 * MANY, 2, 4, 64, 130, dtype)
    alone = native.attend(*given)
    torch.set_num_threads(2)
    assert torch.equal(native.attend(*given), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, MANY])
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_nan_is_not_lost(where: str, T: int, dtype: torch.dtype):
    q, k, v, cos, sin, positions, keys, values = drawn(1, T, 1, 1, 64, 10, dtype)
    {"key": keys, "value": values, "query": q}[where][..., 3] = torch.nan
    assert native.attend(q, k, v, cos, sin, positions, keys, values).isnan().any(-1).all()
    x = torch.full((1, 64), torch.nan)
    assert native.swiglu(x, torch.ones(1, 64)).isnan().all()
    assert native.rms_norm(x.bfloat16(), torch.ones(64).bfloat16(), 1e-5).isnan().all()


# --- the modules -----------------------------------------------------------------------------------------


def fused_model(**changes: object) -> Llama:
    model = unit_gain_(Llama(config_from_dict({**TINY, "head_dim": 16, **changes}))).eval()
    fuse(model)
    return model


def pass_(model: Llama, T: int = 9) -> Tensor:
    with torch.no_grad():
        return model(some_ids(1, T), model.new_cache(1, T))


def never(*_: object) -> Tensor:
    raise AssertionError("compiled code ran")


def test_every_norm_mlp_and_attention_is_fused_and_print_says_so():
    model = fused_model()
    kinds = [type(module) for module in model.modules()]
    assert not any(kind in FUSED for kind in kinds)
    assert all(kinds.count(kind) > 0 for kind in FUSED.values())
    assert "FusedAttention" in str(model)


def test_without_a_compiler_nothing_is_fused(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert not any(isinstance(module, FusedAttention) for module in fused_model().modules())


@pytest.mark.parametrize("address", ["q_rot", "k_rot", "z"])
def test_values_can_still_be_captured(address: str):
    model = fused_model()
    whole = pass_(model)
    with capture(model, f"layers.*.self_attn.{address}") as values:
        seen = pass_(model)
    torch.testing.assert_close(seen, whole, atol=1e-4, rtol=1e-4)
    assert len(values) == len(model.attentions)
    assert values[f"layers.0.self_attn.{address}"].shape[2:] == (9, 16)


def test_another_kernel_is_not_passed_by(monkeypatch):
    model = fused_model()
    monkeypatch.setattr(native, "attend", never)
    model.set_attention(eager)
    pass_(model)
    model.set_attention(lambda q, k, v, context: torch.zeros_like(q), layers=[0])
    assert torch.isfinite(pass_(model)).all()


def test_gradients_reach_every_weight_as_without(monkeypatch):
    for name in ("attend", "swiglu", "rms_norm"):
        monkeypatch.setattr(native, name, never)
    model = fused_model()
    model(some_ids(1, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_norm_s_weight_has_a_gradient_where_its_input_has_none():
    norm = fused_model().norm
    norm(torch.ones(1, norm.weight.numel())).sum().backward()
    assert norm.weight.grad is not None


def test_only_a_model_s_own_cache_and_dtype_are_written_to_by_compiled_code(monkeypatch):
    monkeypatch.setattr(native, "attend", never)
    model = fused_model()
    cache = model.new_cache(1, 9)
    cache.__class__ = type("Mine", (type(cache),), {})
    with torch.no_grad():
        model(some_ids(1, 9), cache)  # someone else's may keep things in another way
        with pytest.raises(RuntimeError, match="dtype"):  # as without fusing
            model(some_ids(1, 9), KVCache(model.config, 1, 9, dtype=torch.bfloat16, device="cpu"))
    pass_(model.to(torch.float16))


def test_heads_of_an_odd_size_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(native, "attend", never)
    pass_(fused_model(head_dim=8))


def test_a_pass_without_a_cache_gives_the_same():
    model = fused_model()
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids(1, 5)), pass_(model, 5), atol=1e-4, rtol=1e-4)


# --- a whole layer in one call ---------------------------------------------------------------------------


def fast_model(kind: str = "same", dtype: torch.dtype = torch.float32, **changes: object) -> Llama:
    model = fused_model(**{"intermediate_size": 192, **changes}).to(dtype)
    for path, layer in fast_layers(model, kind).items():
        model.set_submodule(path, layer)
    return model


def steps(model: Llama, rows: int = 2) -> Tensor:
    """A prefill of 37 tokens, of which one row has 35, then four steps; the logits of all."""
    cache, ids = model.new_cache(rows, 42), some_ids(rows, 41)
    start = torch.arange(MANY).repeat(rows, 1)
    start[-1] = (start[-1] - 2).clamp(min=-1)
    with torch.no_grad():
        logits = [model(ids[:, :MANY], cache, start)]
        for t in range(MANY, 41):
            logits.append(model(ids[:, t : t + 1], cache, start[:, -1:] + t + 1 - MANY))
    return torch.cat(logits, dim=1)


def assert_is_its_parts(model: Llama) -> None:
    whole = steps(model)
    for block in model.layers:
        block.__class__ = Block
    assert torch.equal(steps(model), whole)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many tokens each compiled layer was given."""
    given = []
    right = native.layer

    def layer(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        given.append(x.shape[0] * x.shape[1])
        return right(x, *rest, **options)

    monkeypatch.setattr(native, "layer", layer)
    return given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["same", "int8"])
def test_a_layer_in_one_call_has_the_bits_of_its_parts(kind: str, dtype: torch.dtype, calls):
    model = fast_model(kind, dtype)
    assert_is_its_parts(model)
    assert calls == len(model.layers) * [2 * MANY] + 4 * len(model.layers) * [2]  # and then not the parts


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("n", [1, 12, 13, 32, 33, 40])
def test_so_has_one_for_any_number_of_tokens(n: int, dtype: torch.dtype):
    model = fast_model(dtype=dtype)
    whole = pass_(model, n)
    for block in model.layers:
        block.__class__ = Block
    assert torch.equal(pass_(model, n), whole)


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 2000))
def test_long_texts_are_computed_in_even_parts(B: int, T: int):
    parts = [(range(B)[rows], range(T)[tokens]) for rows, tokens in native._parts(B, T)]
    sizes = [len(rows) * len(tokens) for rows, tokens in parts]
    assert sum(sizes) == B * T
    for rows, tokens in parts:  # each goes on where another ended, in its row or in the one before
        assert tokens.start == 0 or (rows, tokens.start) in {(some, t.stop) for some, t in parts}
        assert rows.start == 0 or rows.start in {some.stop for some, _ in parts}
    assert max(sizes) <= native.VECTORS
    # Each goes the way of the whole: through matmul.c, and through the attention of as many tokens.
    if B * T > native.VECTORS:
        assert min(sizes) > native.FEW
        assert all(len(tokens) == T or len(tokens) > native.FEW for _, tokens in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T"), [(1, 513), (1, 1100), (3, 200), (20, 40), (600, 1)])
@pytest.mark.parametrize("back", [False, True])
def test_a_layer_in_parts_has_the_bits_of_one(B: int, T: int, dtype: torch.dtype, back: bool):
    model = fast_model(dtype=dtype)
    ids, positions = some_ids(B, T), torch.arange(T).repeat(B, 1)
    if back:  # a token sees the slots before its own, of tokens that come later, too
        positions = positions.flip(1)
    logits = []
    for kind in (type(model.layers[0]), Block):
        for block in model.layers:
            block.__class__ = kind
        with torch.no_grad():
            cache = model.new_cache(B, T + 1)
            logits.append(model(ids, cache, positions))
            logits.append(model(ids[:, :1], cache, torch.full((B, 1), T)))  # reads what they have stored
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["same", "int8"])
@pytest.mark.parametrize("T", [1, 2, 12, 13, 33, 37, 512, 513, 1100])
@pytest.mark.parametrize("back", [False, True])
def test_a_last_layer_of_which_only_the_last_token_is_asked_for_has_its_bits(
    kind: str, dtype: torch.dtype, T: int, back: bool
):
    model, ids, positions = fast_model(kind, dtype), some_ids(1, T), torch.arange(T)[None]
    if back:
        positions = positions.flip(1)
    caches = [model.new_cache(1, T) for _ in range(2)]
    with torch.no_grad():
        whole = model.hidden_states(ids, caches[0], positions)
        last = model.hidden_states(ids, caches[1], positions, last=True)
    assert last.shape == (1, 1, model.config.hidden_size)
    assert torch.equal(last, whole[:, -1:])
    assert torch.equal(caches[1].keys, caches[0].keys)
    assert torch.equal(caches[1].values, caches[0].values)


def test_other_tokens_are_left_out_of_one_row_s_last_layer_that_nobody_hears():
    model, given = fast_model(), []
    model.norm.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[:2]))

    def run(rows: int) -> None:
        with torch.no_grad():
            model.hidden_states(some_ids(rows, MANY), model.new_cache(rows, MANY), last=True)

    run(rows=1)
    run(rows=2)
    for part in ("", ".mlp"):
        with capture(model, address := f"layers.{len(model.layers) - 1}{part}") as values:
            run(rows=1)
        assert values[address].shape[:2] == (1, MANY)
    assert given == [(1, 1), (2, MANY), (1, MANY), (1, MANY)]


def test_so_is_it_when_a_prompt_goes_into_the_cache():
    model, given = fast_model(), []
    model.norm.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[:2]))
    ids = some_ids(1, MANY)
    with torch.no_grad():
        logits = model.lm_head(model.hidden_states(ids, model.new_cache(1, MANY))[:, -1])
    assert torch.equal(prefill(model, ids.tolist(), model.new_cache(1, MANY)), logits)
    assert given == [(1, MANY), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 5, MANY])
@pytest.mark.parametrize("width", [64, 192])
def test_a_layer_writes_nothing_beyond_the_memory_that_it_asked_for(
    T: int, width: int, dtype: torch.dtype, monkeypatch
):
    guards = []

    class Room:
        def of(self, size: int) -> Tensor:
            floats = torch.full((size + 4096,), 1.5)
            guards.append(floats[size:])
            return floats

    monkeypatch.setattr(native, "_room", Room())
    pass_(fast_model(dtype=dtype, intermediate_size=width), T)
    assert guards
    assert all((guard == 1.5).all() for guard in guards)


def test_so_has_one_with_rows_that_matvec_does_not_take():
    assert_is_its_parts(fast_model(intermediate_size=176))


def test_so_has_one_whose_matrices_are_many_blocks():
    assert_is_its_parts(fast_model(hidden_size=320, intermediate_size=832))


@pytest.mark.parametrize("flags", FLAGS[1:], ids=" ".join)
def test_every_kind_of_processor_computes_a_layer_alike(flags: tuple[str, ...], monkeypatch):
    if "-mavx2" in flags and "avx2" not in native.CPUINFO.read_text():
        pytest.skip("this machine has no AVX2")
    here = steps(fast_model())
    monkeypatch.setattr(native, "FLAGS", (*flags, "-fPIC", "-fopenmp"))
    forget()
    try:
        torch.testing.assert_close(steps(fast_model()), here, atol=1e-4, rtol=1e-4)
    finally:
        forget()


@pytest.mark.parametrize(
    "address",
    [
        *("", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_rot", "k_rot", "z", "o_proj")),
        *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "product", "down_proj")),
    ],
)
def test_whoever_listens_inside_a_layer_hears_it(address: str, calls):
    model = fast_model()
    whole = steps(model)
    calls.clear()
    with capture(model, f"layers.1.{address}".rstrip(".")) as values:
        steps(model)
    assert len(values) == 1
    # Not in the first layer, which `capture` asks about memory; and a layer's own result is known anyway.
    assert len(calls) == 5 * (len(model.layers) - 1 - (address != ""))
    with patch(model, {f"layers.1.{address}".rstrip("."): torch.zeros_like}):
        assert not torch.equal(steps(model), whole)


def zeros(x: Tensor, *_: object) -> Tensor:
    return torch.zeros_like(x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "forward of the MLP": lambda block: setattr(block.mlp, "forward", zeros),
    "forward of a tap": lambda block: setattr(block.self_attn.z, "forward", zeros),
    "another MLP": lambda block: setattr(block, "mlp", nn.Identity()),
    "another matrix": lambda block: setattr(block.mlp, "down_proj", Linear(192, 64)),
    "another kernel": lambda block: setattr(block.self_attn, "kernel", eager),
    "a pre-hook": lambda block: block.mlp.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "a hook": lambda block: block.mlp.register_forward_hook(lambda _, given, result: 2 * result),
    "a matrix in 16 bits": lambda block: setattr(
        block.mlp, "up_proj", FastLinear(random(192, 64).bfloat16())
    ),
    "a norm in 16 bits": lambda block: block.input_layernorm.bfloat16(),
    "eps of the first norm": lambda block: setattr(block.input_layernorm, "eps", 10.0),
    "eps of the second norm": lambda block: setattr(block.post_attention_layernorm, "eps", 10.0),
    "weights in place": lambda block: block.mlp.up_proj.weight.data.zero_(),
    "other memory": lambda block: setattr(block.mlp.up_proj.weight, "data", random(192, 64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_in_place_of_a_part_is_used(change: str):
    model, unchanged = fast_model(), steps(fast_model())
    steps(model)  # nothing of the layer as it was is kept
    CHANGES[change](model.layers[2])
    assert not torch.equal(steps(model), unchanged)
    assert_is_its_parts(model)


def test_gradients_are_left_to_the_parts(monkeypatch):
    monkeypatch.setattr(native, "layer", never)
    model = fast_model()
    assert model(some_ids(1, 4), model.new_cache(1, 4)).requires_grad
    for block in model.layers:
        block.requires_grad_(False)
    assert model(some_ids(1, 4), model.new_cache(1, 4)).requires_grad  # by the embedding


@pytest.mark.parametrize("T", [4, MANY])
def test_tokens_beyond_the_cache_are_an_error_as_without_compiled_code(T: int):
    model = fast_model()
    with torch.no_grad(), pytest.raises(IndexError):
        model(some_ids(1, T), model.new_cache(1, T - 2))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_replacements_may_lie_in_memory_in_any_way_and_have_gradients(name: str):
    model = fast_model()

    def logits(replacement: Tensor) -> Tensor:
        with patch(model, {f"layers.1.{name}": lambda x: replacement.expand(x.shape)}):
            return model(some_ids(1, 5), model.new_cache(1, 5))

    with torch.no_grad():
        whole = logits(torch.ones(1, 1, 1))
        with patch(model, {f"layers.1.{name}": torch.ones_like}):
            torch.testing.assert_close(whole, model(some_ids(1, 5), model.new_cache(1, 5)))
    model.requires_grad_(False)
    assert logits(torch.ones(1, 1, 1, requires_grad=True)).requires_grad
