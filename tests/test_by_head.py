"""Kernels by layer and by head: each head attends by its own kernel, and nothing else changes."""

import copy
from functools import cache, partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tinyllama
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import AttentionContext, AttentionMask, eager, sdpa
from tinyllama.errors import InputError
from tinyllama.hooks import capture, patch
from tinyllama.kernels import ByHead, kernel_name

B, T, H, L = 2, 7, 8, 4


def window(q, k, v, context, size=3, step=1):
    """The last few keys: every one, or every second and so on."""
    behind = context.mask.query_positions[:, :, None] - context.mask.key_positions[:, None, :]
    return eager(q, k, v, context.where(((behind < size * step) & (behind % step == 0))[:, None]))


def flat(q, k, v, context):
    """The mean of all visible keys; its pattern is no softmax of its scores."""
    mask = context.mask.allowed.expand(-1, q.shape[1], -1, -1).to(q.dtype)
    context.scores(mask - 1)
    pattern = context.pattern(mask / mask.sum(-1, keepdim=True).clamp(min=1))
    return pattern @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


class Gain(nn.Module):
    """A kernel with weights: a factor on each head's scores."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, H))

    def forward(self, q, k, v, context):
        return eager(q * self.gain[:, None, None], k, v, context)


KERNELS = [eager, sdpa, window, flat]
TAPPED = [eager, window, flat]
some_heads = pytest.mark.parametrize("heads", [[0], [6, 1], list(range(H))])
pairs = pytest.mark.parametrize(
    ("kernel", "others"), [(window, eager), (eager, sdpa), (sdpa, window), (flat, window)]
)


def values_of(model, *parts, layer=1):
    """What a layer's attention computed for the same text."""
    with torch.no_grad(), capture(model, *(f"layers.{layer}.self_attn.{part}" for part in parts)) as values:
        model(some_ids(B, T))
    return [values[f"layers.{layer}.self_attn.{part}"] for part in parts]


def with_kernel(kernel, layer=1):
    """Eager in all layers but one, which sees the same input whatever its kernel is."""
    model = tiny_model()
    model.set_attention(kernel, layers=[layer])
    return model


@cache
def alone(kernel, layer=1):
    """Scores and pattern (None where it has none) and z, where all heads of the layer have that kernel."""
    parts = ["z"] if kernel is sdpa else ["scores", "pattern", "z"]
    values = values_of(with_kernel(kernel, layer), *parts, layer=layer)
    return tuple([None] * (3 - len(values)) + values)


def mixed(kernel, heads, others, layer=1):
    model = with_kernel(others, layer)
    model.set_attention(kernel, layers=[layer], heads=heads)
    return model


def joined(heads, chosen, rest):
    """Head by head, what is expected of the two."""
    return torch.stack([(chosen if head in heads else rest)[:, head] for head in range(H)], dim=1)


def rms(x):
    return x.double().square().mean().sqrt().item()


# Which kernel a head has


@pairs
@some_heads
def test_each_head_attends_by_its_own_kernel_to_the_bit(kernel, others, heads):
    (z,) = values_of(mixed(kernel, heads, others), "z")
    chosen, rest = alone(kernel)[2], alone(others)[2]
    assert torch.equal(z, joined(heads, chosen, rest))
    assert not torch.equal(chosen, rest)


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.sampled_from(KERNELS), st.sets(st.integers(0, H - 1))), max_size=4),
    st.sampled_from(KERNELS),
    st.integers(0, L - 1),
)
@example([(window, {0}), (flat, {1}), (sdpa, {0})], eager, 2)
@example([(window, {0, 1}), (flat, {1, 2}), (window, {2})], sdpa, 0)
def test_of_several_assignments_the_last_one_for_a_head_counts(assignments, first, layer):
    model, own = with_kernel(first, layer), [first] * H
    for kernel, heads in assignments:
        model.set_attention(kernel, layers=[layer], heads=heads)
        own = [kernel if head in heads else before for head, before in enumerate(own)]
    (z,) = values_of(model, "z", layer=layer)
    for head, kernel in enumerate(own):
        assert torch.equal(z[:, head], alone(kernel, layer)[2][:, head]), head


def test_layers_and_heads_are_chosen_together():
    model = tiny_model(attention="sdpa")
    model.set_attention(window, layers=range(1, 3), heads=(head for head in (2, 5)))
    names = [kernel_name(layer.self_attn.kernel) for layer in model.layers]
    assert names == ["sdpa", *["window in heads 2, 5, sdpa in the others"] * 2, "sdpa"]
    model.set_attention(eager, heads=[2])
    assert all(kernel_name(layer.self_attn.kernel).startswith("eager in heads 2, ") for layer in model.layers)
    model.set_attention(eager)  # without heads it takes the place of all
    assert all(layer.self_attn.kernel is eager for layer in model.layers)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"heads": [0, 8]}, "heads: expected 0 to 7, got 8"),
        ({"heads": [-1]}, "heads: expected 0 to 7, got -1"),
        ({"layers": [0, 4]}, "layers: expected 0 to 3, got 4"),
        ({"layers": [-1]}, "layers: expected 0 to 3, got -1"),
        ({"layers": [4], "heads": [0]}, "layers: expected 0 to 3, got 4"),
        ({"layers": [0], "heads": [3, 9]}, "heads: expected 0 to 7, got 9"),
    ],
)
def test_an_unknown_layer_or_head_is_refused_and_nothing_is_changed(where, expected):
    model = tiny_model()
    with pytest.raises(InputError, match=f"^{expected}$"):
        model.set_attention(window, **where)
    assert all(layer.self_attn.kernel is eager for layer in model.layers)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (window, "window"),
        (partial(window, size=64), "window(size=64)"),
        (partial(window), "window"),
        (partial(partial(window, size=64), size=2), "window(size=2)"),
        (partial(window, size=2, step=3), "window(size=2, step=3)"),
        (Gain(), "Gain"),
        (partial(Gain(), size=2), "Gain(size=2)"),
        (ByHead(flat, [1], partial(window, size=5)), "flat in heads 1, window(size=5) in the others"),
    ],
)
def test_a_kernel_is_named_as_it_was_written_with_its_settings(kernel, name):
    assert kernel_name(kernel) == name
    model = tiny_model(num_hidden_layers=1)
    model.set_attention(kernel)
    assert f"kernel={name}\n" in str(model)


# With a cache, padding, a compiler and gradients


@pytest.mark.parametrize(("kernel", "others"), [(window, eager), (window, sdpa), (sdpa, window)])
def test_ragged_prompts_together_continue_as_each_alone(kernel, others):
    model = tiny_model()
    model.set_attention(others)
    model.set_attention(kernel, heads=[0, 5])
    prompts = [some_ids(1, length, seed=length)[0].tolist() for length in (9, 4, 1)]
    together = tinyllama.generate(model, prompts, max_new_tokens=6, eos_ids=())
    logits = tinyllama.prefill(model, prompts, model.new_cache(3, 16))
    for row, prompt in enumerate(prompts):
        assert tinyllama.generate(model, [prompt], max_new_tokens=6, eos_ids=()) == [together[row]]
        text = torch.tensor([prompt + together[row]])
        with torch.no_grad():
            whole = model(text)[0, len(prompt) - 1 :]  # without a cache
        assert whole[:-1].argmax(-1).tolist() == together[row]
        # 1e-5 is the ceiling on float32 relRMS.
        assert rms(logits[row] - whole[0]) <= 1e-5 * rms(whole[0])


def test_decoding_is_one_graph_in_which_each_head_has_its_kernel():
    torch._dynamo.reset()
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, ids = tiny_model(num_hidden_layers=2), some_ids(2, 4)
    model.set_attention(window, heads=[0, 5])
    model.set_attention(Gain(), layers=[1], heads=[1])
    step = torch.compile(model, fullgraph=True, backend=collect)
    compiled_cache, cache = model.new_cache(2, 8), model.new_cache(2, 8)
    with torch.no_grad():
        for t in range(4):
            positions = torch.tensor([[t], [t - 2]]).clamp(min=-1)
            compiled = step(ids[:, t : t + 1], compiled_cache, positions)
            expected = model(ids[:, t : t + 1], cache, positions)
            torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)
    assert len(graphs) == 1


def test_a_gradient_goes_through_each_heads_own_kernel():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, 8, generator=generator)
    k, v = torch.randn(2, B, 2, T, 8, generator=generator)
    weight = torch.randn(B, H, T, 8, generator=generator)
    positions = torch.arange(T).expand(B, T)
    mask = AttentionMask.of(positions, positions, True, tiny_model().rotary)
    context = AttentionContext(mask, 8**-0.5, 0, lambda x: x, lambda x: x, range(H), H)

    def gradients(kernel, heads):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        z = kernel(*inputs, context)
        return torch.autograd.grad((z * weight)[:, heads].sum(), inputs)

    heads, rest = [1, 6], [0, 2, 3, 4, 5, 7]
    both = gradients(ByHead(window, heads, eager), list(range(H)))
    chosen, others = gradients(window, heads), gradients(eager, rest)
    assert torch.equal(both[0], joined(heads, chosen[0], others[0]))
    for of_both, a, b in zip(both, chosen, others, strict=True):  # keys and values serve heads of both
        torch.testing.assert_close(of_both, a + b, atol=1e-6, rtol=1e-5)


# Scores and pattern, read and replaced


@settings(max_examples=5)
@given(
    st.lists(st.tuples(st.sampled_from(TAPPED), st.sets(st.integers(0, H - 1))), min_size=1, max_size=3),
    st.sampled_from(TAPPED),
)
@example([(window, {0}), (flat, {1}), (eager, {0})], eager)
def test_nested_assignments_have_one_pattern_and_a_patch_of_it_reaches_all(assignments, first):
    model, own = with_kernel(first), [first] * H
    for kernel, heads in assignments:
        model.set_attention(kernel, layers=[1], heads=heads)
        own = [kernel if head in heads else before for head, before in enumerate(own)]
    scores, pattern = values_of(model, "scores", "pattern")
    with patch(model, {"layers.1.self_attn.pattern": lambda x: x * 2}):
        patched, z = values_of(model, "pattern", "z")
    for head, kernel in enumerate(own):
        assert torch.equal(scores[:, head], alone(kernel)[0][:, head])
        assert torch.equal(pattern[:, head], alone(kernel)[1][:, head])
        # Patched once: twice would give four times the pattern. Doubling is exact.
        assert torch.equal(patched[:, head], alone(kernel)[1][:, head] * 2)
        assert torch.equal(z[:, head], alone(kernel)[2][:, head] * 2)


@pytest.mark.parametrize(("kernel", "others"), [(window, eager), (flat, window)])
@some_heads
def test_a_patch_acts_once_on_each_head_whichever_kernel_it_has(kernel, others, heads):
    # Compared with layers that have one kernel. These patches give another result if they act twice.
    changes = {
        "layers.1.self_attn.scores": lambda x: x * 0.5 + 1,
        "layers.1.self_attn.pattern": lambda x: x * torch.arange(H)[:, None, None] + 0.1,
    }

    def patched(model):
        with patch(model, changes):
            return values_of(model, "scores", "pattern", "z")

    both = patched(mixed(kernel, heads, others))
    for value, a, b in zip(both, patched(with_kernel(kernel)), patched(with_kernel(others)), strict=True):
        assert torch.equal(value, joined(heads, a, b))


def test_a_tensor_in_place_of_the_pattern_serves_both_kernels():
    model = mixed(window, [0, 5], eager)
    own = torch.eye(T).expand(B, H, T, T)  # every token sees itself only
    with patch(model, {"layers.1.self_attn.pattern": own}):
        pattern, z, v = values_of(model, "pattern", "z", "v_proj")
    assert torch.equal(pattern, own)
    values = v.view(B, T, 2, 8).transpose(1, 2)  # (B, K, T, D)
    assert torch.equal(z, values.repeat_interleave(4, dim=1))


@pytest.mark.parametrize("tapped", TAPPED)
@pytest.mark.parametrize("fused_is_chosen", [False, True])
def test_where_one_kernel_has_no_pattern_it_is_the_other_ones(tapped, fused_is_chosen):
    heads = [0, 5] if fused_is_chosen else [1, 2, 3, 4, 6, 7]  # sdpa has 0 and 5
    model = mixed(sdpa, heads, tapped) if fused_is_chosen else mixed(tapped, heads, sdpa)
    scores, pattern = values_of(model, "scores", "pattern")
    assert torch.equal(scores, alone(tapped)[0])
    assert torch.equal(pattern, alone(tapped)[1])
    # A patch reaches the heads that have the pattern, and no others.
    with patch(model, {"layers.1.self_attn.pattern": lambda x: x * 2}):
        (z,) = values_of(model, "z")
    assert torch.equal(z, joined([0, 5], alone(sdpa)[2], alone(tapped)[2] * 2))


def test_where_no_kernel_has_a_pattern_that_is_said():
    with pytest.raises(InputError, match=r"eager does \(kernel=sdpa in heads 0, sdpa in the others\)"):
        values_of(mixed(sdpa, [0], sdpa), "pattern")


def test_a_captured_pattern_has_the_gradient_of_every_head():
    grads = []
    for model in (with_kernel(eager), mixed(lambda *args: eager(*args), [0, 5], eager)):
        with capture(model, "layers.1.self_attn.pattern") as values:
            loss = model(some_ids(B, T)).square().sum()
        grads += torch.autograd.grad(loss, list(values.values()))
    torch.testing.assert_close(*grads)


# Kernels with weights


def kernel_keys(model):
    return [key for key in model.state_dict() if ".kernel" in key]


def test_functions_add_nothing_to_the_state_dict():
    model = tiny_model(attention="sdpa")
    keys = list(model.state_dict())
    model.set_attention(window, heads=[0, 5])
    model.set_attention(partial(window, size=2), layers=[1], heads=[1])
    assert list(model.state_dict()) == keys
    tiny_model().load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("heads", "key"), [(None, "kernel.gain"), ([2, 6], "kernel.kernel.gain")], ids=["all", "some heads"]
)
def test_the_weights_of_a_kernel_belong_to_the_model(heads, key):
    model, gain = tiny_model(), Gain()
    before = model.num_parameters()
    model.set_attention(gain, layers=[1], heads=heads)
    assert kernel_keys(model) == [f"layers.1.self_attn.{key}"]
    assert model.num_parameters() == before + H

    model(some_ids(B, T)).square().sum().backward()
    reached = gain.gain.grad.nonzero().flatten().tolist()
    assert reached == (list(range(H)) if heads is None else heads)

    twin = copy.deepcopy(model)
    with torch.no_grad():
        gain.gain.mul_(3)
        assert not torch.equal(twin(some_ids(1, T)), model(some_ids(1, T)))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(some_ids(1, T)), model(some_ids(1, T)))
    model.to(torch.float64)
    assert gain.gain.dtype == torch.float64
    assert model(some_ids(1, T)).dtype == torch.float64


def test_the_kernel_that_stays_for_the_others_keeps_its_weights():
    model = tiny_model()
    model.set_attention(Gain(), layers=[1])
    model.set_attention(window, layers=[1], heads=[0])
    assert kernel_keys(model) == ["layers.1.self_attn.kernel.others.gain"]
    model(some_ids(B, T)).square().sum().backward()
    assert model.layers[1].self_attn.kernel.others.gain.grad.nonzero().flatten().tolist() == list(range(1, H))


@pytest.mark.parametrize("heads", [None, [2, 6]])
@pytest.mark.parametrize("how", ["assigned", "set"])
def test_a_function_or_another_module_can_replace_a_kernel_with_weights(how, heads):
    # A registered module would refuse the assignment of a function.
    model = tiny_model()
    keys = list(model.state_dict())
    for _ in range(2):  # and back again
        model.set_attention(Gain(), layers=[1])
        model.set_attention(Gain(), layers=[1], heads=heads)
        assert len(kernel_keys(model)) == (1 if heads is None else 2)
        if how == "assigned":
            model.layers[1].self_attn.kernel = window
        else:
            model.set_attention(window, layers=[1])
        assert model.layers[1].self_attn.kernel is window
        assert list(model.state_dict()) == keys
        assert torch.equal(values_of(model, "z")[0], alone(window)[2])


def test_a_kernel_with_weights_has_no_addresses_and_its_values_are_captured_as_any():
    model = mixed(Gain(), [0, 5], window)
    assert set(tinyllama.addresses(model)) == set(tinyllama.addresses(tiny_model()))
    learned = values_of(with_kernel(Gain()), "scores", "pattern", "z")
    for value, a, b in zip(values_of(model, "scores", "pattern", "z"), learned, alone(window), strict=True):
        assert torch.equal(value, joined([0, 5], a, b))
