"""Values by address: each can be read and replaced, nothing else changes, and no hook stays behind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyllama
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager
from tinyllama.errors import InputError
from tinyllama.hooks import addresses, capture, matching, numel, patch, shape
from tinyllama.kernels import KERNELS

B, T, L = 2, 7, 4
# No two axes are of one length, so that a value of swapped axes has another shape.
UNLIKE = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 40,
    "vocab_size": 50,
}
LETTERS = {"C": 48, "H": 6, "K": 3, "D": 10, "F": 40, "V": 50}
ATTENTION = ["q_proj", "k_proj", "v_proj", "q_rot", "k_rot", "scores", "pattern", "z", "o_proj"]
MLP = ["gate_proj", "up_proj", "product", "down_proj"]
LAYER = [
    ".input_layernorm",
    *(f".self_attn.{name}" for name in ATTENTION),
    ".self_attn",
    ".post_attention_layernorm",
    *(f".mlp.{name}" for name in MLP),
    ".mlp",
    "",
]


def in_order(layers):
    """Every address of a model, in the order of the computation."""
    within = [f"layers.{layer}{part}" for layer in range(layers) for part in LAYER]
    return ["embed_tokens", *within, "norm", "lm_head"]


def hooks(model):
    """How many hooks there are on the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def captured(model, ids, *patterns):
    """The values at the addresses, all if none is named."""
    with torch.no_grad(), capture(model, *(patterns or addresses(model))) as values:
        model(ids)
    return values


def same(values, expected):
    return values.keys() == expected.keys() and all(torch.equal(values[a], expected[a]) for a in values)


# What is captured


def test_addresses_are_all_steps_of_the_computation():
    assert sorted(addresses(tiny_model())) == sorted(in_order(L))
    assert tinyllama.addresses is addresses
    assert tinyllama.capture is capture
    assert tinyllama.patch is patch


@pytest.mark.parametrize("cached", [False, True])
def test_every_value_has_the_shape_that_is_promised_and_comes_in_order(cached):
    model, ids = tiny_model(**UNLIKE), some_ids(B, T, vocab_size=50)
    S = 11 if cached else T
    with torch.no_grad(), capture(model, *addresses(model)) as values:
        if cached:  # given positions, attention reads the whole cache behind a mask
            model(ids, model.new_cache(B, S), torch.arange(T).expand(B, T))
        else:
            model(ids)
    assert list(values) == in_order(2)
    sizes = {"B": B, "T": T, "S": S} | LETTERS
    for address, value in values.items():
        expected = [math.prod(sizes[one] for one in axis.split("*")) for axis in shape(address).split()]
        assert list(value.shape) == expected, address
        assert numel(model.config, address, B, T, S) == value.numel(), address


@settings(max_examples=15)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 5),
    more=st.none() | st.integers(0, 4),
    chosen=st.lists(st.sampled_from(in_order(2)), min_size=1, max_size=6),
)
def test_any_addresses_in_any_order_give_their_values_in_computation_order(rows, length, more, chosen):
    model, ids = tiny_model(**UNLIKE), some_ids(rows, length, vocab_size=50)
    cache = None if more is None else model.new_cache(rows, length + more)
    positions = None if cache is None else torch.arange(length).expand(rows, length)
    with torch.no_grad(), capture(model, *chosen) as values:
        model(ids, cache, positions)
    assert list(values) == [address for address in in_order(2) if address in chosen]
    for address, value in values.items():
        S = length if more is None else length + more
        assert value.numel() == numel(model.config, address, rows, length, S)


@pytest.mark.parametrize("attention", sorted(KERNELS))
def test_capturing_changes_no_bit_of_the_output(attention):
    model, ids = tiny_model(attention=attention), some_ids(B, T)
    there = [a for a in addresses(model) if attention == "eager" or a.split(".")[-1] not in ATTENTION[5:7]]
    with torch.no_grad():
        expected = model(ids)
        with capture(model, *there) as values:
            assert torch.equal(model(ids), expected)
        assert torch.equal(model(ids), expected)
    assert torch.equal(values["lm_head"], expected)
    assert hooks(model) == 0


def test_values_are_what_the_model_computed_and_no_copies():
    # A copy would need the memory twice.
    model, seen = tiny_model(), []
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    values = captured(model, some_ids(B, T), "layers.1.mlp")
    assert values["layers.1.mlp"] is seen[0]


def test_a_second_pass_replaces_the_values_in_the_same_dictionary():
    model, first, second = tiny_model(), some_ids(B, T), some_ids(1, 3, seed=1)
    with torch.no_grad(), capture(model, "layers.*", "norm") as values:
        model(first)
        kept = dict(values)
        model(second)
    assert same(kept, captured(model, first, "layers.*", "norm"))
    assert same(values, captured(model, second, "layers.*", "norm"))


def test_captured_values_belong_to_the_graph():
    # The gradient of a captured value is the slope of the loss along it, by a patch on both sides.
    model, ids = tiny_model(dtype=torch.float64), some_ids(1, T)
    at = {
        "layers.1.self_attn.pattern": (0, 3, 5, 2),
        "layers.2": (0, 4, 9),
        "layers.0.mlp.product": (0, 6, 1),
    }
    with capture(model, *at) as values:
        loss = model(ids).square().sum()
    for value in values.values():
        value.retain_grad()
    loss.backward()
    for address, entry in at.items():
        sides = []
        for step in (1e-5, -1e-5):
            moved = values[address].detach().clone()
            moved[entry] += step
            with torch.no_grad(), patch(model, {address: moved}):
                sides.append(model(ids).square().sum())
        slope = (sides[0] - sides[1]) / 2e-5
        # float64 differences over 1e-5 of a smooth function keep seven digits or more.
        torch.testing.assert_close(values[address].grad[entry], slope, rtol=1e-6, atol=1e-6)


def test_without_gradients_and_in_inference_mode_values_have_no_graph():
    model, ids = tiny_model(), some_ids(B, T)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), capture(model, "layers.3") as values:
            model(ids)
        assert not values["layers.3"].requires_grad
        assert torch.equal(values["layers.3"].clone(), captured(model, ids)["layers.3"])


def test_generating_with_a_cache_gives_the_values_of_the_last_step():
    model, prompts = tiny_model(), [[5, 6, 7], [8, 9]]
    options = {"max_new_tokens": 4, "eos_ids": ()}
    expected = tinyllama.generate(model, prompts, **options)
    with capture(model, "layers.*.self_attn.pattern", "norm") as values:
        assert tinyllama.generate(model, prompts, **options) == expected
    S = 3 + 3  # the longest prompt, and all new tokens but the last
    for layer in range(L):
        pattern = values[f"layers.{layer}.self_attn.pattern"]
        assert pattern.shape == (2, 8, 1, S)
        assert (pattern[1, :, :, 5:] == 0).all()  # the shorter row is one token behind
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 8, 1), atol=1e-6, rtol=0)
    assert values["norm"].shape == (2, 1, 64)
    assert hooks(model) == 0


def test_a_stream_can_be_watched_token_by_token():
    model, at, shapes = tiny_model(), "layers.2.self_attn.pattern", []
    expected = list(tinyllama.stream(model, [5, 6, 7], max_new_tokens=4, eos_ids=()))
    with capture(model, at) as values:
        tokens = []
        for token in tinyllama.stream(model, [5, 6, 7], max_new_tokens=4, eos_ids=()):
            tokens.append(token)
            shapes.append(tuple(values[at].shape))
    assert tokens == expected
    assert shapes == [(1, 8, 3, 3), (1, 8, 1, 4), (1, 8, 1, 5), (1, 8, 1, 6)]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*", [f"layers.{n}" for n in range(L)]),
        ("layers.[0-1].mlp", ["layers.0.mlp", "layers.1.mlp"]),
        ("layers.?.self_attn.z", [f"layers.{n}.self_attn.z" for n in range(L)]),
        ("*", ["embed_tokens", "lm_head", "norm"]),
        ("*.3.*.[kv]_proj", ["layers.3.self_attn.k_proj", "layers.3.self_attn.v_proj"]),
        ("layers.2.mlp.*_proj", [f"layers.2.mlp.{n}_proj" for n in ("down", "gate", "up")]),
    ],
)
def test_a_star_stands_for_one_part_only(pattern, expected):
    # `layers.*` is the residual stream; a star that crossed dots would take everything below as well.
    model = tiny_model()
    assert sorted(matching(model, pattern)) == expected
    assert sorted(captured(model, some_ids(1, 3), pattern)) == expected


@settings(max_examples=20)
@given(address=st.sampled_from(in_order(L)), data=st.data())
def test_an_address_with_stars_matches_what_agrees_in_the_other_parts(address, data):
    model, parts = tiny_model(), address.split(".")
    free = data.draw(st.sets(st.integers(0, len(parts) - 1)))
    pattern = ".".join("*" if n in free else part for n, part in enumerate(parts))
    expected = [
        other
        for other in (one.split(".") for one in in_order(L))
        if len(other) == len(parts) and all(n in free or other[n] == parts[n] for n in range(len(parts)))
    ]
    assert sorted(matching(model, pattern)) == sorted(".".join(other) for other in expected)


def test_an_address_named_twice_has_one_value():
    model = tiny_model()
    assert matching(model, "norm", "*", "norm").count("norm") == 1
    assert list(captured(model, some_ids(1, 3), "layers.1.mlp", "layers.*.mlp", "layers.1.mlp")) == [
        f"layers.{n}.mlp" for n in range(L)
    ]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layers.0.self_attn.patern", r"layers\.0\.self_attn\.pattern"),
        ("layers.4.mlp", r"layers\.\d\.mlp"),
        ("embed", "embed_tokens"),
        ("model.norm", "norm"),
        ("layers", r"layers\.\d"),  # a list of modules, which computes nothing itself
        ("rotary", r"\S+"),  # gives out a pair
        ("Norm", "norm"),
        ("layers.*.*.*.*", "layers.*"),
        ("", r"\S+"),
    ],
)
def test_an_unknown_address_is_refused_with_the_nearest_one(pattern, near):
    model = tiny_model()
    expected = rf"^{pattern.replace('*', '[*]')}: no such address; near is {near}"
    with pytest.raises(InputError, match=expected), capture(model, pattern):
        pytest.fail("entered")
    with pytest.raises(InputError, match=expected), patch(model, {pattern: torch.zeros_like}):
        pytest.fail("entered")


def test_no_address_at_all_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="expected one at least, got none"), capture(model):
        pytest.fail("entered")
    with pytest.raises(InputError, match="expected one at least, got none"), patch(model, {}):
        pytest.fail("entered")


# What must not pass in silence


@pytest.mark.parametrize("at", ["scores", "pattern"])
def test_a_fused_kernel_has_no_scores_and_no_pattern_and_that_is_said(at):
    model, ids = tiny_model(attention="sdpa"), some_ids(1, 3)
    where = f"layers.*.self_attn.{at}"
    expected = rf"^layers\.0\.self_attn\.{at} and 3 more: nothing was computed there; .*\(kernel=sdpa\)$"
    with pytest.raises(InputError, match=expected), capture(model, "norm", where):
        model(ids)
    with pytest.raises(InputError, match=expected), patch(model, {where: torch.zeros_like}):
        model(ids)
    # The layer that lacks it is the one that is named, and the kernel is that layer's own.
    model.set_attention(eager, layers=[0, 1, 3])
    expected = rf"^layers\.2\.self_attn\.{at}: nothing was computed there; .*kernel=sdpa"
    with pytest.raises(InputError, match=expected), capture(model, where):
        model(ids)
    with pytest.raises(InputError, match=expected), patch(model, {where: torch.zeros_like}):
        model(ids)
    assert hooks(model) == 0


@pytest.mark.parametrize("at", ["layers.2.mlp", "layers.2.self_attn.pattern", "embed_tokens"])
def test_a_block_that_runs_no_pass_is_an_error(at):
    model = tiny_model()
    with pytest.raises(InputError, match=f"^{at}: nothing was computed there"), capture(model, at):
        pass
    with (
        pytest.raises(InputError, match=f"^{at}: nothing was computed"),
        patch(model, {at: torch.zeros_like}),
    ):
        pass
    advice = "run the model inside the block$"
    with pytest.raises(InputError, match=advice), capture(model, "norm"):
        tiny_model()(some_ids(1, 3))  # another model
    assert hooks(model) == 0


def test_one_address_that_is_not_computed_is_an_error_beside_others_that_are():
    model, ids = tiny_model(), some_ids(1, 3)
    with pytest.raises(InputError, match=r"^lm_head: nothing was computed there"), capture(model, "*"):
        model.hidden_states(ids)
    both = {"norm": torch.zeros_like, "lm_head": torch.zeros_like}
    with pytest.raises(InputError, match=r"^lm_head: nothing was computed there"), patch(model, both):
        model.hidden_states(ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_error_inside_the_block_is_not_masked_by_what_was_not_computed(attention):
    model, at = tiny_model(attention=attention), "layers.0.self_attn.pattern"
    with pytest.raises(ZeroDivisionError), capture(model, at):
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), patch(model, {at: torch.zeros_like}):
        _ = 1 / 0


@pytest.mark.parametrize("how", ["wrapped", "in place", "one block"])
def test_a_compiled_model_is_refused(how):
    # It ignores hooks: a patch would do nothing, and say nothing.
    torch._dynamo.reset()
    model = tiny_model()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.layers[2]).compile(backend="eager")
    with pytest.raises(InputError, match=r"model: it is compiled|got OptimizedModule; pass the model"):
        capture(model, "norm").__enter__()
    with pytest.raises(InputError, match=r"model: it is compiled|got OptimizedModule; pass the model"):
        patch(model, {"norm": torch.zeros_like}).__enter__()
    assert hooks(model) == 0


def test_something_else_than_a_llama_is_refused():
    with pytest.raises(InputError, match="expected a Llama, got Block; pass the model itself"):
        capture(tiny_model().layers[0], "mlp").__enter__()


# Memory


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_needs_more_memory_than_is_free_is_refused_before_it_is_computed(monkeypatch, dtype, cached):
    model, ids, computed = tiny_model(dtype=dtype, **UNLIKE), some_ids(B, T, vocab_size=50), []
    cache = model.new_cache(B, 11) if cached else None
    positions = torch.arange(T).expand(B, T) if cached else None

    def counted(q, k, v, context):
        computed.append("kernel")
        return eager(q, k, v, context)

    model.set_attention(counted)
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: computed.append("q_proj"))
    wanted = ["layers.*.self_attn.pattern", "layers.1.mlp.*", "lm_head", "layers.*.self_attn.[kq]_*"]
    with torch.no_grad(), capture(model, *wanted) as values:
        model(ids, cache, positions)
    needed = sum(value.nbytes for value in values.values())

    computed.clear()
    monkeypatch.setattr(tinyllama.device, "free_memory", lambda device: needed - 1)
    with torch.no_grad(), pytest.raises(InputError, match="memory: what is captured needs"):  # noqa: SIM117
        with capture(model, *wanted) as values:
            model(ids, cache, positions)
    assert (computed, values, hooks(model)) == ([], {}, 1)  # the hook is this test's own
    # Exactly as much as is needed is enough.
    monkeypatch.setattr(tinyllama.device, "free_memory", lambda device: needed)
    with torch.no_grad(), capture(model, *wanted) as values:
        model(ids, cache, positions)
    assert len(values) == 2 + 4 + 1 + 8


def test_memory_is_estimated_for_each_pass_anew(monkeypatch):
    # The second text is longer.
    model = tiny_model()
    with torch.no_grad(), capture(model, "layers.*") as values:
        model(some_ids(1, 3))
        free = sum(value.nbytes for value in values.values())
        monkeypatch.setattr(tinyllama.device, "free_memory", lambda device: free)
        model(some_ids(1, 3))
        with pytest.raises(InputError, match="memory: what is captured"):
            model(some_ids(1, 4))


# Whatever happens, the model is as before


def fail(*_):
    raise ZeroDivisionError


def capture_without_memory(model, ids):
    with pytest.MonkeyPatch.context() as changes, capture(model, "layers.*"):
        changes.setattr(tinyllama.device, "free_memory", lambda device: 1)
        model(ids)


def capture_interrupted(model, ids):
    with capture(model, "layers.*"):
        model(ids)
        raise KeyboardInterrupt


def patch_interrupted(model, ids):
    with patch(model, {"layers.*": torch.zeros_like, "norm": torch.zeros_like}):
        model(ids)
        raise KeyboardInterrupt


def capture_of_a_pass_that_fails(model, ids):
    with capture(model, "layers.*"), patch(model, {"layers.2": fail}):
        model(ids)


def patch_with_a_wrong_replacement(model, ids):
    with patch(model, {"layers.1": torch.zeros_like, "layers.2": torch.zeros(3)}):
        model(ids)


def capture_at_a_wrong_address(model, ids):
    with capture(model, "norm", "nrm"):
        model(ids)


def patch_at_a_wrong_address(model, ids):
    # The first one's hook is there by the time that the second is found wrong.
    with patch(model, {"norm": torch.zeros_like, "nrm": torch.zeros_like}):
        model(ids)


def capture_of_nothing(model, ids):
    with capture(model, "layers.*"):
        pass


def patch_of_nothing(model, ids):
    with patch(model, {"norm": torch.zeros_like}):
        pass


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (capture_without_memory, InputError, "memory"),
        (capture_interrupted, KeyboardInterrupt, None),
        (patch_interrupted, KeyboardInterrupt, None),
        (capture_of_a_pass_that_fails, ZeroDivisionError, None),
        (patch_with_a_wrong_replacement, InputError, r"layers\.2: expected"),
        (capture_at_a_wrong_address, InputError, "nrm: no such address"),
        (patch_at_a_wrong_address, InputError, "nrm: no such address"),
        (capture_of_nothing, InputError, "nothing was computed"),
        (patch_of_nothing, InputError, "nothing was computed"),
    ],
)
def test_the_model_is_as_before_after_an_error(use, error, message):
    model, ids = tiny_model(), some_ids(B, T)
    own = model.layers[1].register_forward_hook(lambda *_: None)  # a user's own hook is left alone
    with torch.no_grad():
        expected = model(ids)
        # The error stays in use, as in a notebook: with it everything that its traceback refers to.
        with pytest.raises(error, match=message) as raised:
            use(model, ids)
        assert hooks(model) == 1
        own.remove()
        assert hooks(model) == 0
        assert torch.equal(model(ids), expected)
    del raised


def test_the_model_is_as_before_after_a_patch():
    model, ids = tiny_model(), some_ids(B, T)
    with torch.no_grad():
        expected = model(ids)
        with (
            capture(model, "layers.*"),
            patch(model, {"layers.*": torch.zeros_like, "norm": torch.ones_like}),
        ):
            assert not torch.equal(model(ids), expected)
        assert hooks(model) == 0
        assert torch.equal(model(ids), expected)


# What is patched


def test_a_tensor_takes_the_place_of_a_value_and_changes_all_that_follows():
    # The MLP's part of the residual stream is the one number that is put there.
    model, ids = tiny_model(), some_ids(B, T)
    plain = captured(model, ids)
    new = torch.full((B, T, 64), 0.5)
    with torch.no_grad(), patch(model, {"layers.1.mlp": new}), capture(model, *addresses(model)) as values:
        logits = model(ids)
    changed = [address for address in values if not torch.equal(values[address], plain[address])]
    assert changed == in_order(L)[in_order(L).index("layers.1.mlp") :]
    # x + mlp(x), where mlp(x) is now 0.5.
    before = plain["layers.0"] + plain["layers.1.self_attn"]
    assert torch.equal(values["layers.1"], before + 0.5)
    assert torch.equal(logits, values["lm_head"])
    assert torch.equal(new, torch.full((B, T, 64), 0.5))


def test_a_function_gets_the_value_and_acts_at_every_address_of_its_pattern():
    model, ids = tiny_model(), some_ids(B, T)
    seen = []

    def without_head_5(z):
        seen.append(z)
        return z * (torch.arange(8) != 5)[:, None, None]

    with torch.no_grad(), patch(model, {"layers.*.self_attn.z": without_head_5}):
        logits = model(ids)
    # The same ablation in the weights: nothing reads head 5.
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data[:, 5 * 8 : 6 * 8] = 0
    values = captured(model, ids)
    assert len(seen) == L
    assert torch.equal(logits, values["lm_head"])
    for layer, z in enumerate(seen):
        assert torch.equal(z, values[f"layers.{layer}.self_attn.z"])


def test_a_patch_acts_again_in_every_pass():
    model, ids = tiny_model(), some_ids(B, T)
    with torch.no_grad(), patch(model, {"norm": lambda x: x + 1}):
        first, second = model(ids), model(ids)
    assert torch.equal(first, second)
    assert not torch.equal(first, captured(model, ids)["lm_head"])


def test_generation_follows_a_patch():
    model = tiny_model()

    def only_7(logits):
        return torch.zeros_like(logits).index_fill(-1, torch.tensor(7), 1.0)

    with patch(model, {"lm_head": only_7}):
        assert tinyllama.generate(model, [[1, 2], [3]], max_new_tokens=3, eos_ids=()) == [[7] * 3] * 2
        assert list(tinyllama.stream(model, [1, 2], max_new_tokens=3, eos_ids=())) == [7] * 3
    assert tinyllama.generate(model, [[1, 2]], max_new_tokens=3, eos_ids=()) != [[7] * 3]


def test_who_comes_later_sees_what_was_replaced_before():
    model, ids, at = tiny_model(), some_ids(B, T), "layers.1.mlp"
    original = captured(model, ids, at)[at]
    with (
        torch.no_grad(),
        capture(model, at) as earlier,
        patch(model, {at: lambda x: x + 1}),
        capture(model, at) as between,
        patch(model, {at: lambda x: x * 2}),
        capture(model, at) as later,
    ):
        model(ids)
    assert torch.equal(earlier[at], original)
    assert torch.equal(between[at], original + 1)
    assert torch.equal(later[at], (original + 1) * 2)


def test_two_replacements_at_one_address_act_in_their_order():
    model, ids, at = tiny_model(), some_ids(B, T), "layers.1.mlp"
    original = captured(model, ids, "layers.*.mlp")
    add, double = (lambda x: x + 1), (lambda x: x * 2)
    for first, second, expected in [
        (add, double, (original[at] + 1) * 2),
        (double, add, original[at] * 2 + 1),
    ]:
        both = {"layers.1.mlp": first, "layers.[1-1].mlp": second}
        with torch.no_grad(), patch(model, both), capture(model, at) as values:
            model(ids)
        assert torch.equal(values[at], expected)


@pytest.mark.parametrize(
    ("new", "got"),
    [
        (torch.zeros(1, T, 64), r"\[1, 7, 64\] float32 on cpu"),  # it would broadcast without a word
        (torch.zeros(64), r"\[64\] float32 on cpu"),
        (torch.zeros(B, 64, T), r"\[2, 64, 7\] float32 on cpu"),
        (torch.zeros(B, T, 64, dtype=torch.float64), r"\[2, 7, 64\] float64 on cpu"),
        (torch.zeros(B, T, 64, device="meta"), r"\[2, 7, 64\] float32 on meta"),
        (0.0, "float"),
        (None, "NoneType"),
        ([0.0], "list"),
        (lambda x: None, "NoneType"),
        (lambda x: (x,), "tuple"),
        (lambda x: x[:1], r"\[1, 7, 64\] float32 on cpu"),
        (lambda x: x.half(), r"\[2, 7, 64\] float16 on cpu"),
    ],
)
def test_a_replacement_unlike_the_value_is_refused(new, got):
    model, ids = tiny_model(), some_ids(B, T)
    expected = (
        rf"^layers\.1\.mlp: expected a replacement like the value, \[2, 7, 64\] float32 on cpu, got {got}$"
    )
    with torch.no_grad(), pytest.raises(InputError, match=expected), patch(model, {"layers.1.mlp": new}):
        model(ids)


def test_blocks_whose_parts_give_zero_leave_head_of_norm_of_embedding():
    model, ids = tiny_model(), some_ids(B, T)
    nothing = {"layers.*.self_attn": torch.zeros_like, "layers.*.mlp": torch.zeros_like}
    with torch.no_grad():
        with patch(model, nothing):
            logits = model(ids)
        assert torch.equal(logits, model.lm_head(model.norm(model.embed_tokens(ids))))


def test_the_very_value_in_its_own_place_changes_no_bit():
    model, ids = tiny_model(), some_ids(B, T)
    plain = captured(model, ids)
    for address in plain:
        with torch.no_grad(), patch(model, {address: plain[address]}):
            assert torch.equal(model(ids), plain["lm_head"]), address
    with torch.no_grad(), patch(model, plain):
        assert same(captured(model, ids), plain)


@pytest.mark.parametrize("layer", range(L))
def test_the_residual_stream_of_another_run_makes_all_that_follows_that_run(layer):
    # What causal tracing rests on: nothing passes a layer by.
    model, one, other = tiny_model(), some_ids(B, T), some_ids(B, T, seed=1)
    here, there = captured(model, one), captured(model, other)
    at = f"layers.{layer}"
    with torch.no_grad(), patch(model, {at: there[at]}), capture(model, *addresses(model)) as values:
        model(one)
    border = in_order(L).index(at)
    for n, address in enumerate(in_order(L)):
        assert torch.equal(values[address], (here if n < border else there)[address]), address


def test_a_gradient_reaches_what_was_put_in_by_a_patch():
    # So a steering vector can be trained: its gradient is that of the value, summed over where it is added.
    model, ids, at = tiny_model(), some_ids(B, T), "layers.1"
    vector = torch.zeros(64, requires_grad=True)
    with patch(model, {at: lambda x: x + vector}), capture(model, at) as values:
        model(ids).square().sum().backward(inputs=[vector, values[at]])
    torch.testing.assert_close(vector.grad, values[at].grad.sum((0, 1)))
    assert vector.grad.abs().min() > 0
