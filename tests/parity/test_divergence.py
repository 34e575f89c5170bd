"""The search names the first wrong operation and a suspect: planted bugs, all suspects, a reader's model."""

import math
from dataclasses import replace

import pytest
import torch

import tinyllama.attention
from tests.shapes import ROPE_SCALINGS, some_ids, tiny_model
from tinyllama.attention import eager
from tinyllama.kernels import KERNELS
from tinyllama.parity import bisect, oracle_logits
from tinyllama.parity.changed import changed
from tinyllama.parity.comparison import REFERENCES, kernel_run, reference_run
from tinyllama.parity.mutations import MUTATIONS
from tinyllama.parity.reference import config_fields
from tinyllama.parity.scene import Scene, relative_error
from tinyllama.parity.suspects import formulas, suspect
from tinyllama.parity.trace import operations, our_trace, stages
from tinyllama.rope import rotate

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

T = 48
IDS = some_ids(1, T)[0].tolist()


def search(run, right):
    return bisect(run, right, IDS, [reference_run(right, name) for name in REFERENCES])


def search_model(wrong, **changes):
    return search(lambda ids, at: our_trace(wrong, ids, at), tiny_model(**changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_right_model_diverges_nowhere(dtype):
    model = tiny_model(dtype=dtype)
    assert all(search(kernel_run(model, kernel), model) is None for kernel in KERNELS.values())


def test_every_value_inside_is_the_very_float_of_transformers():
    model = tiny_model()
    addresses = [*stages(4), *(address for layer in range(4) for address in operations(layer))]
    for attention in REFERENCES:
        model.set_attention(KERNELS[attention])
        ours, theirs = our_trace(model, IDS, addresses), reference_run(model, attention)(IDS, addresses)
        for address in addresses:
            fused = attention == "sdpa" and address.endswith(("scores", "pattern"))
            if fused:
                assert ours[address] is theirs[address] is None
            elif address.endswith("scores"):
                mask = torch.ones(T, T, dtype=torch.bool).tril()
                assert torch.equal(ours[address][:, mask], theirs[address][:, mask])
            else:
                assert torch.equal(ours[address], theirs[address]), (attention, address)


def test_watching_leaves_no_hook_behind():
    model = tiny_model()
    reference = reference_run(model, "eager")
    before = reference(IDS, ["lm_head"])["lm_head"]
    with pytest.raises(IndexError):
        our_trace(model, [10**6], ["layers.1", "lm_head"])
    our_trace(model, IDS, stages(4))
    reference(IDS, [*stages(4), *operations(1)])
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(reference(IDS, ["lm_head"])["lm_head"], before)


# --- bugs planted in the model, beyond the sixteen -------------------------------------------------------


def as_meta(weight):
    """The rows of a q or k projection in the order of Meta's files: pairs next to each other."""
    return weight.view(-1, 2, 4, 64).transpose(1, 2).reshape(-1, 64).clone()


def by_kernel(kernel, layer=None):
    """Plant a kernel, in one layer or all."""
    return lambda model: model.set_attention(kernel, layers=None if layer is None else [layer])


def by_weight(path, wrong):
    """Plant a weight, made from the model and the right one."""

    def plant(model):
        weight = model.get_parameter(f"{path}.weight")
        weight.copy_(wrong(model, weight).clone())

    return plant


def by_output(path, wrong):
    """Plant an output, made from the module, its input and the right output."""
    return lambda model: model.get_submodule(path).register_forward_hook(
        lambda module, args, output: wrong(module, args[0], output)
    )


def k_and_v_swapped(model):
    attention = model.layers[1].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def window(q, k, v, context):
    seen = context.mask
    near = seen.key_positions[:, None, None, :] > seen.query_positions[:, None, :, None] - 8
    return eager(q, k, v, context.where(near))


def no_mask(q, k, v, context):
    everything = replace(context.mask, allowed=torch.ones_like(context.mask.allowed), causal=False)
    return eager(q, k, v, replace(context, mask=everything))


def other_scale(q, k, v, context):
    return eager(q, k, v, replace(context, scale=0.3))


def fused_and_tiled(q, k, v, context):
    k, v = k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def bfloat16_pattern(q, k, v, context):
    low = replace(context, pattern=lambda pattern: context.pattern(pattern.bfloat16().float()))
    return eager(q, k, v, low)


def bfloat16_norm(norm, x, _output):
    low = x.bfloat16()
    low = low * torch.rsqrt(low.square().mean(-1, keepdim=True) + norm.eps)
    return (norm.weight.bfloat16() * low).float()


def permuted_twice(_model, weight):
    return weight.view(-1, 4, 2, 64).transpose(1, 2).reshape(-1, 64)


def other_layer_s(model, _weight):
    return model.layers[2].mlp.down_proj.weight


Q_ROT, K_PROJ = "layers.0.self_attn.q_rot", "layers.2.self_attn.k_proj"
UP, DOWN, O_PROJ = "layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "layers.3.self_attn.o_proj"
NORM, EMBEDDING = "layers.2.post_attention_layernorm", "embed_tokens"
PLANTED = [
    (by_weight(K_PROJ, lambda _, w: as_meta(w)), K_PROJ, "pair order of Meta's"),
    (by_weight(K_PROJ, permuted_twice), K_PROJ, "put into Hugging Face's pair order twice"),
    (by_weight(DOWN, other_layer_s), DOWN, "the weight of layers.2.mlp.down_proj is used"),
    (by_weight(O_PROJ, lambda _, w: w.T), O_PROJ, "the weight is transposed"),
    (by_weight(UP, lambda _, w: w + 0.01 * torch.randn(176, 64)), UP, "none that is known"),
    (by_weight(EMBEDDING, lambda _, w: 8 * w), EMBEDDING, "embeddings are scaled by sqrt(hidden_size)"),
    (k_and_v_swapped, "layers.1.self_attn.k_proj", "k and v are swapped"),
    (by_output("layers.1", lambda _, x, out: out - x), "layers.1", "the layer's input is left out"),
    (by_output(NORM, bfloat16_norm), NORM, "the norm is computed in bfloat16"),
    (by_kernel(window, 1), "layers.1.self_attn.scores", "a token sees at most itself and the 7 before it"),
    (by_kernel(no_mask), "layers.0.self_attn.scores", "nothing is masked"),
    (by_kernel(other_scale, 2), "layers.2.self_attn.scores", "scores are scaled by 0.3, not by"),
    (by_kernel(fused_and_tiled), "layers.0.self_attn.z", "KV heads are tiled"),
    (by_kernel(bfloat16_pattern, 0), "layers.0.self_attn.pattern", "the pattern is rounded to bfloat16"),
]


@pytest.mark.parametrize(("plant", "address", "why"), PLANTED, ids=[why for *_, why in PLANTED])
def test_a_bug_in_one_place_is_found_there(plant, address, why):
    model = tiny_model()
    plant(model)
    found = search_model(model)
    assert found.address == address
    assert why in str(found)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda x, cos, sin: x, "RoPE is not applied"),
        (lambda x, cos, sin: rotate(x, cos, -sin), "RoPE turns the other way"),
    ],
)
def test_a_wrong_rotation_is_found(wrong, why):
    with changed((tinyllama.attention, "rotate", wrong)):
        found = search_model(tiny_model())
    assert (found.address, found.suspect) == (Q_ROT, why)


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_rope_scaling_that_is_left_out_is_named(kind):
    context = {"max_position_embeddings": T // 2}  # so that a dynamic one acts
    found = search_model(tiny_model(**context), rope_scaling=ROPE_SCALINGS[kind], **context)
    assert (found.address, found.suspect) == (Q_ROT, "RoPE scaling is left out")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [(None, "the sliding window is left out"), (11, "the sliding window is one token longer")],
)
def test_a_wrong_sliding_window_is_named(wrong, why):
    found = search_model(
        tiny_model(model_type="mistral", sliding_window=wrong), model_type="mistral", sliding_window=10
    )
    assert (found.address, found.suspect) == ("layers.0.self_attn.scores", why)


def test_a_factor_of_yarn_s_that_is_left_out_is_named():
    yarn = ROPE_SCALINGS["yarn"]
    found = search_model(tiny_model(rope_scaling=yarn | {"attention_factor": 1.0}), rope_scaling=yarn)
    assert (found.address, found.suspect) == (Q_ROT, "YaRN's factor on cos and sin is left out")


def test_what_is_found_comes_with_its_numbers():
    model = tiny_model()
    by_output(UP, lambda _, x, out: out.index_fill(2, torch.tensor(5), 9.0))(model)
    found = search_model(model)
    assert (found.address, found.shape, found.place[1], found.got) == (UP, (T, 176), 5, 9.0)
    assert abs(found.expected - found.theirs) < 1e-5
    assert found.reference < found.limit < found.relative
    assert found.path[-1].address == UP
    assert all(step.relative <= step.limit for step in found.path if step.address.startswith("layers.0"))
    assert f"{UP}, shape (48, 176)" in str(found)


def test_nan_and_another_shape_are_divergences():
    right = tiny_model()

    def nan(ids, at):
        return our_trace(right, ids, at) | {"layers.2": torch.full((T, 64), math.nan)}

    def short(ids, at):
        return our_trace(right, ids, at) | {"lm_head": torch.zeros(T, 319)}

    assert search(nan, right).address == "layers.2"
    found = search(short, right)
    assert (found.address, found.shape, found.suspect) == ("lm_head", (T, 319), None)
    assert math.isnan(found.got)


def test_a_reader_may_give_only_some_values():
    # A hand-written model with interleaved pairs, of which only these values are captured.
    right, wrong = tiny_model(), tiny_model()

    def run(ids, at):
        known = ["layers.0", "layers.0.self_attn.q_proj", "layers.0.self_attn.q_rot", "lm_head"]
        return our_trace(wrong, ids, [address for address in known if address in at])

    (interleaved,) = (mutation for mutation in MUTATIONS if "interleaved" in mutation.name)
    with interleaved.planted(wrong):
        found = search(run, right)
    assert found.address == "layers.0.self_attn.q_rot"
    assert found.suspect == interleaved.suspect


def test_wrong_values_in_a_layer_whose_output_is_not_given_are_found():
    right, wrong = tiny_model(), tiny_model()
    by_output(UP, lambda _, x, out: out * 2)(wrong)
    found = search(lambda ids, at: our_trace(wrong, ids, [address for address in at if address == UP]), right)
    assert (found.address, found.path[-1].address) == (UP, UP)


def test_what_cannot_be_compared_is_refused():
    right = tiny_model()
    for given, says in (
        ({}, "nothing could be compared"),
        ({"layers.0.self_attn.scores": None}, "nothing could be compared"),
        ({"layer.3": None}, "did you mean 'layers.3'?"),
    ):
        with pytest.raises(tinyllama.InputError, match=says) as refused:
            search(lambda ids, at, given=given: given, right)
        assert "layers.0 to layers.3, norm, lm_head" in str(refused.value)


def test_a_batch_axis_is_named_with_both_shapes():
    right = tiny_model()

    def batched(ids, at):
        return {address: value[None] for address, value in our_trace(right, ids, at).items()}

    found = search(batched, right)
    assert found.suspect == "a batch axis: give value[0]"
    assert f"shape (1, {T}, 64), expected ({T}, 64)" in str(found)


# --- every suspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, "llama3", "yarn"])
def test_every_suspect_is_named_where_it_is_the_truth(scaling):
    model = tiny_model(dtype=torch.float64, rope_scaling=ROPE_SCALINGS.get(scaling))
    config, weights = config_fields(model.config), model.state_dict()
    named = set()
    for layer, before in ((None, "embed_tokens"), (2, "layers.1")):
        addresses = [*stages(4), *operations(2)]
        trace = dict.fromkeys(addresses)
        oracle_logits(config, weights, IDS, trace)
        places = ["embed_tokens", "norm", "lm_head"] if layer is None else [*operations(2), "layers.2"]
        for address in places:
            came_in = {"norm": "layers.3", "lm_head": "norm"}.get(address, before)
            seen = {other: trace[other] for other in [*operations(2), address]} | {"input": trace[came_in]}
            for name, value in formulas(Scene(address, seen, config, weights, IDS)):
                if relative_error(value, trace[address]) < 1e-9:
                    continue  # the right formula, or one whose number is fitted to the right values
                # As a float32 implementation would have it.
                scene = Scene(address, seen | {address: value.float().double()}, config, weights, IDS)
                answer = suspect(scene)
                assert answer is not None, (address, name)
                same = relative_error(value, dict(formulas(scene))[answer]) < 1e-6
                assert answer == name or same, (address, name, answer)
                named.add(name)
    assert len(named) > 60


def test_a_suspect_is_never_named_for_rounding():
    model = tiny_model()
    config, weights = config_fields(model.config), model.state_dict()
    trace = reference_run(model, "eager")(IDS, ["layers.1", *operations(2)])
    seen = {address: value.double() for address, value in trace.items() if address != "layers.1"}
    seen["input"] = trace["layers.1"].double()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    seen["layers.2.self_attn.scores"].masked_fill_(future, -math.inf)
    for address in operations(2):
        assert suspect(Scene(address, seen, config, weights, IDS)) is None, address
