"""The search names the first wrong operation and a suspect: planted bugs, all suspects, a reader's model."""

import math
from dataclasses import replace

import pytest
import torch

import tinyllama.attention
from tests.shapes import LLAMA3_SCALING, some_ids, tiny_model
from tinyllama.attention import eager
from tinyllama.kernels import KERNELS
from tinyllama.parity import bisect, oracle_logits
from tinyllama.parity.comparison import REFERENCES, kernel_run, reference_run
from tinyllama.parity.mutations import MUTATIONS
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.scene import Scene, relative_error
from tinyllama.parity.suspects import formulas, suspect
from tinyllama.parity.trace import operations, our_trace, reference_trace, stages

pytestmark = pytest.mark.usefixtures("no_grad")

T = 48
IDS = some_ids(1, T)[0].tolist()


def search(run, right, truth=None):
    references = [reference_run(right, name) for name in REFERENCES]
    return bisect(run, right, IDS, references, truth)


def search_model(wrong, **changes):
    return search(lambda ids, at: our_trace(wrong, ids, at), tiny_model(**changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", sorted(KERNELS))
def test_the_right_model_diverges_nowhere(dtype, attention):
    model = tiny_model(dtype=dtype)
    assert search(kernel_run(model, KERNELS[attention]), model) is None


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


def permuted(weight):
    """A q or k projection whose rows stand as in Meta's files: pairs next to each other."""
    C = weight.shape[1]
    return weight.view(-1, 2, 4, C).transpose(1, 2).reshape(-1, C).clone()


def permuted_rows(model, monkeypatch):
    projection = model.layers[2].self_attn.k_proj
    projection.weight.copy_(permuted(projection.weight))


def permuted_twice(model, monkeypatch):
    projection = model.layers[2].self_attn.k_proj
    weight = projection.weight
    projection.weight.copy_(weight.view(-1, 4, 2, 64).transpose(1, 2).reshape(-1, 64).clone())


def k_and_v_swapped(model, monkeypatch):
    attention = model.layers[1].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def another_layer(model, monkeypatch):
    model.layers[1].mlp.down_proj.weight.copy_(model.layers[2].mlp.down_proj.weight)


def transposed(model, monkeypatch):
    weight = model.layers[3].self_attn.o_proj.weight
    weight.copy_(weight.T.clone())


def no_rope(model, monkeypatch):
    monkeypatch.setattr(tinyllama.attention, "rotate", lambda x, cos, sin: x)


def turned_back(model, monkeypatch):
    rotate = tinyllama.attention.rotate
    monkeypatch.setattr(tinyllama.attention, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))


def window(model, monkeypatch):
    def kernel(q, k, v, context):
        seen = context.mask
        near = seen.key_positions[:, None, None, :] > seen.query_positions[:, None, :, None] - 8
        return eager(q, k, v, context.where(near))

    model.set_attention(kernel, layers=[1])


def no_mask(model, monkeypatch):
    def kernel(q, k, v, context):
        everything = replace(context.mask, mask=torch.ones_like(context.mask.allowed), causal=False)
        return eager(q, k, v, replace(context, allowed=everything))

    model.set_attention(kernel)


def other_scale(model, monkeypatch):
    model.set_attention(lambda q, k, v, context: eager(q, k, v, replace(context, scale=0.3)), layers=[2])


def fused_and_tiled(model, monkeypatch):
    def kernel(q, k, v, context):
        k, v = k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    model.set_attention(kernel)


def bfloat16_pattern(model, monkeypatch):
    def kernel(q, k, v, context):
        low = replace(context, pattern=lambda pattern: context.pattern(pattern.bfloat16().float()))
        return eager(q, k, v, low)

    model.set_attention(kernel, layers=[0])


def scaled_embedding(model, monkeypatch):
    model.embed_tokens.weight.mul_(8.0)


def no_residual(model, monkeypatch):
    model.layers[1].register_forward_hook(lambda block, args, output: output - args[0])


def rounded_norm(model, monkeypatch):
    model.layers[2].post_attention_layernorm.register_forward_hook(
        lambda norm, args, output: norm.weight.bfloat16().mul(low_norm(args[0], norm.eps)).float()
    )


def low_norm(x, eps):
    low = x.bfloat16()
    return low * torch.rsqrt(low.square().mean(-1, keepdim=True) + eps)


PLANTED = {
    permuted_rows: ("layers.2.self_attn.k_proj", "pair order of Meta's"),
    permuted_twice: ("layers.2.self_attn.k_proj", "put into Hugging Face's pair order twice"),
    k_and_v_swapped: ("layers.1.self_attn.k_proj", "k and v are swapped"),
    another_layer: ("layers.1.mlp.down_proj", "the weight of layers.2.mlp.down_proj is used"),
    transposed: ("layers.3.self_attn.o_proj", "the weight is transposed"),
    no_rope: ("layers.0.self_attn.q_rot", "RoPE is not applied"),
    turned_back: ("layers.0.self_attn.q_rot", "RoPE turns the other way"),
    window: ("layers.1.self_attn.scores", "a token sees at most itself and the 7 before it"),
    no_mask: ("layers.0.self_attn.scores", "nothing is masked"),
    other_scale: ("layers.2.self_attn.scores", "scores are scaled by 0.3, not by 1/sqrt(head_dim)"),
    fused_and_tiled: ("layers.0.self_attn.z", "KV heads are tiled"),
    bfloat16_pattern: ("layers.0.self_attn.pattern", "the pattern is rounded to bfloat16"),
    scaled_embedding: ("embed_tokens", "embeddings are scaled by sqrt(hidden_size)"),
    no_residual: ("layers.1", "the layer's input is left out of its output"),
    rounded_norm: ("layers.2.post_attention_layernorm", "the norm is computed in bfloat16"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_bug_in_one_place_is_found_there(plant, monkeypatch):
    model = tiny_model()
    plant(model, monkeypatch)
    found = search_model(model)
    address, why = PLANTED[plant]
    assert found.address == address
    assert why in found.suspect


def test_rope_scaling_that_is_left_out_is_named():
    wrong = tiny_model()
    found = search_model(wrong, rope_scaling=LLAMA3_SCALING)
    assert found.address == "layers.0.self_attn.q_rot"
    assert found.suspect == "RoPE scaling is left out"


def test_a_weight_that_no_mistake_explains_has_no_suspect():
    model = tiny_model()
    model.layers[1].mlp.up_proj.weight.add_(0.01 * torch.randn(176, 64))
    found = search_model(model)
    assert found.address == "layers.1.mlp.up_proj"
    assert found.suspect is None
    assert "suspect: none that is known" in str(found)


def test_what_is_found_comes_with_its_numbers():
    model = tiny_model()
    model.layers[1].mlp.up_proj.register_forward_hook(
        lambda m, a, out: out.index_fill(2, torch.tensor(5), 9.0)
    )
    found = search_model(model)
    assert found.address == "layers.1.mlp.up_proj"
    assert found.shape == (T, 176)
    assert found.place[1] == 5
    assert found.got == 9.0
    assert abs(found.expected - found.theirs) < 1e-5
    assert found.reference < found.limit < found.error
    assert [step.address for step in found.path][-1] == found.address
    assert all(step.error <= step.limit for step in found.path if step.address.startswith("layers.0"))
    assert "layers.1.mlp.up_proj, shape (48, 176)" in str(found)


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


def test_two_kernels_are_compared_by_the_float64_run_of_one():
    model = tiny_model()

    def capped(q, k, v, context):
        return eager(q, k, v, replace(context, scores=lambda s: context.scores(30 * torch.tanh(s / 30))))

    truth = kernel_run(tiny_model(dtype=torch.float64), eager)
    assert search(kernel_run(model, eager), model, truth) is None
    found = search(kernel_run(model, capped), model, truth)
    assert found.address == "layers.0.self_attn.scores"


# --- every suspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_every_suspect_is_named_where_it_is_the_truth(scaled):
    changes = {"rope_scaling": LLAMA3_SCALING} if scaled else {}
    model = tiny_model(dtype=torch.float64, **changes)
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
    addresses = ["layers.1", *operations(2)]
    trace = reference_trace_of(model, addresses)
    for address in operations(2):
        seen = {other: value.double() for other, value in trace.items() if other != "layers.1"}
        seen["input"] = trace["layers.1"].double()
        seen["layers.2.self_attn.scores"] = seen["layers.2.self_attn.scores"].masked_fill(
            ~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf
        )
        assert suspect(Scene(address, seen, config, weights, IDS)) is None, address


def reference_trace_of(model, addresses):
    return reference_trace(reference_model(model, "eager"), IDS, addresses)
