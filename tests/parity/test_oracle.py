"""The oracle judges everything else, so it is checked against closed forms and a second float64 run."""

import math

import pytest
import torch
from transformers.models.llama import modeling_llama

from tests.shapes import LLAMA3_SCALING, some_ids, tiny_model
from tinyllama.parity import difference, oracle_logits
from tinyllama.parity.changed import changed
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.trace import operations, our_trace, stages

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

T = 64
IDS = some_ids(1, T)[0].tolist()


def logits_of(model, trace=None, ids=IDS):
    return oracle_logits(config_fields(model.config), model.state_dict(), ids, trace)


def float64_logits(model, slow=lambda frequencies: frequencies):
    """Logits of transformers with norms, RoPE and softmax in float64, which .double() leaves in float32."""

    def norm(module, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    def rotary(module, x, position_ids):
        D = module.config.head_dim
        frequencies = slow(1 / model.config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float64) / D))
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def softmax(scores, dim, dtype=None):
        return torch.softmax(scores, dim)

    with changed(
        (modeling_llama.LlamaRMSNorm, "forward", norm),
        (modeling_llama.LlamaRotaryEmbedding, "forward", rotary),
        (modeling_llama.nn.functional, "softmax", softmax),
    ):
        return reference_model(model, "eager")(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"head_dim": 22},
        {"rope_theta": 500000.0},
    ],
    ids=str,
)
def test_it_agrees_with_a_transformers_run_in_float64_throughout(shape):
    model = tiny_model(dtype=torch.float64, **shape)
    assert difference(float64_logits(model), logits_of(model)).relative <= 1e-12


def test_it_slows_rope_as_llama_3_does():
    # Meta's three bands, written out: untouched, slowed by the factor, and interpolated in between.
    factor, low, high, context = 8.0, 1.0, 4.0, 32

    def slow(frequencies):
        slowed = []
        for frequency in frequencies.tolist():
            wavelength = 2 * math.pi / frequency
            if wavelength < context / high:
                slowed.append(frequency)
            elif wavelength > context / low:
                slowed.append(frequency / factor)
            else:
                smooth = (context / wavelength - low) / (high - low)
                slowed.append((1 - smooth) * frequency / factor + smooth * frequency)
        return torch.tensor(slowed, dtype=torch.float64)

    model = tiny_model(dtype=torch.float64, rope_scaling=LLAMA3_SCALING)
    assert difference(float64_logits(model, slow), logits_of(model)).relative <= 1e-12


def test_without_attention_and_mlp_the_logits_are_the_head_of_the_normed_embedding():
    model = tiny_model(dtype=torch.float64)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    rows = model.embed_tokens.weight[IDS]
    length = rows.square().mean(dim=1, keepdim=True).add(1e-5).sqrt()
    expected = rows / length * model.norm.weight @ model.lm_head.weight.T
    assert torch.allclose(logits_of(model), expected, rtol=1e-13, atol=1e-13)


def test_equal_scores_average_the_values_seen_so_far():
    model = tiny_model(dtype=torch.float64)
    for layer in model.layers:
        layer.self_attn.q_proj.weight.zero_()
    at = "layers.1.self_attn."
    trace = dict.fromkeys([at + "v_proj", at + "z", at + "pattern"])
    logits_of(model, trace)
    v = trace[at + "v_proj"].view(T, 2, 8).transpose(0, 1)  # (K, T, D)
    means = v.cumsum(dim=1) / torch.arange(1, T + 1)[None, :, None]
    assert torch.allclose(trace[at + "z"], means.repeat_interleave(4, dim=0), rtol=1e-12, atol=1e-14)
    assert torch.allclose(trace[at + "pattern"].sum(dim=-1), torch.ones(8, T, dtype=torch.float64))


def test_its_attention_depends_on_distances_only():
    # With every token alike, the content of q and k is the same everywhere: the scores are a Toeplitz matrix.
    model = tiny_model(dtype=torch.float64)
    trace = dict.fromkeys(["layers.0.self_attn.scores"])
    logits_of(model, trace, ids=[7] * T)
    scores = trace["layers.0.self_attn.scores"]
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance, dim1=1, dim2=2)
        assert (diagonal - diagonal[:, :1]).abs().max() < 1e-12


def test_a_prefix_has_the_logits_of_a_prefix():
    model = tiny_model()
    assert difference(logits_of(model)[:20], logits_of(model, ids=IDS[:20])).relative <= 1e-13


def test_its_trace_has_every_address_of_ours_in_the_same_shape():
    model = tiny_model(dtype=torch.float64)
    addresses = [*stages(4), *operations(2)]
    truth = dict.fromkeys([*addresses, "no such address"])
    logits = logits_of(model, truth)
    assert truth.pop("no such address") is None
    assert truth.keys() == set(addresses)
    ours = our_trace(model, IDS, addresses)
    for address in addresses:
        assert truth[address].shape == ours[address].shape, address
        if not address.endswith("scores"):
            assert difference(ours[address].flatten(0, -2), truth[address].flatten(0, -2)).relative <= 1e-12
    assert torch.equal(truth["lm_head"], logits)
    assert truth["layers.2.self_attn.scores"].isneginf().sum() == 8 * T * (T - 1) / 2
