"""RoPE against its defining properties, so that a wrong pairing, sign or frequency cannot pass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig as ReferenceConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.shapes import LLAMA3_SCALING, ROPE_SCALINGS, tiny_config, tiny_model
from tinyllama.parity.oracle import rope_frequencies, rope_magnitude
from tinyllama.parity.reference import config_fields
from tinyllama.rope import RotaryEmbedding, inverse_frequencies, rotate

CONFIG = tiny_config(head_dim=16)
ROTARY = RotaryEmbedding(CONFIG)


def turned(x, position):
    cos, sin = ROTARY(torch.tensor([[position]]), torch.float64)
    return rotate(x.view(1, 1, 1, -1), cos, sin).flatten()


def vectors():
    seed = st.integers(0, 2**31)
    return seed.map(
        lambda s: torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
    )


@given(vectors(), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_score_depends_on_the_distance_alone(qk, m, n, shift):
    q, k = qk
    torch.testing.assert_close(
        turned(q, m) @ turned(k, n), turned(q, m + shift) @ turned(k, n + shift), atol=1e-10, rtol=1e-12
    )


@given(vectors(), st.integers(0, 100000))
def test_rotation_keeps_the_norm_and_is_the_identity_at_zero(qk, position):
    q, _ = qk
    torch.testing.assert_close(turned(q, position).norm(), q.norm(), atol=0, rtol=1e-12)
    assert torch.equal(turned(q, 0), q)


@given(vectors(), st.integers(0, 5000))
def test_half_split_pairs_turn_as_complex_numbers(qk, position):
    # Fails for Meta's interleaved pairing and for a flipped sign.
    q, _ = qk
    frequencies = torch.tensor([10000.0 ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
    expected = torch.complex(q[:8], q[8:]) * torch.polar(
        torch.ones(8, dtype=torch.float64), position * frequencies
    )
    torch.testing.assert_close(
        turned(q, position), torch.cat((expected.real, expected.imag)), atol=1e-10, rtol=0
    )


YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}  # as published
SCALINGS = {
    "none": {"rope_type": "default"},
    **ROPE_SCALINGS,
    "yarn as published": YARN,
    "yarn, borders not rounded": YARN | {"truncate": False},
    "yarn, both borders in the first pair": YARN | {"original_max_position_embeddings": 1},
    "yarn with a magnitude": YARN | {"attention_factor": 1.25},
    "yarn with two weights": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn with one weight": YARN | {"mscale": 0.7},
    "yarn that shrinks": YARN | {"factor": 0.5},
}


def both(scaling, theta=10000.0, context=48):
    """Our RoPE and transformers', of one head of 64 dimensions."""
    config = tiny_config(head_dim=64, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=context)
    rope = {**scaling, "rope_theta": theta}
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "head_dim": 64, "max_position_embeddings": context}
    return RotaryEmbedding(config), LlamaRotaryEmbedding(ReferenceConfig(**sizes, rope_parameters=rope))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("length", [1, 48, 49, 700])
def test_float32_angles_are_transformers_to_the_bit(scaling, theta, length):
    ours, theirs = both(SCALINGS[scaling], theta)
    assert torch.equal(ours.frequencies(torch.float32, torch.device("cpu")), theirs.inv_freq)
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = ours(torch.arange(length)[None], dtype)
        expected = theirs(torch.empty(0, dtype=dtype), torch.arange(length)[None])
        assert torch.equal(cos[:, 0], expected[0])
        assert torch.equal(sin[:, 0, :, 32:], expected[1][..., 32:])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("length", [48, 700])
def test_float64_angles_are_the_oracle_s(scaling, length):
    # The oracle has every formula from its paper, and shares none with the model.
    rotary, _ = both(SCALINGS[scaling])
    fields = config_fields(rotary.config)
    angles = torch.arange(length)[:, None] * rope_frequencies(fields, length)
    cos, sin = rotary(torch.arange(length)[None], torch.float64)
    for got, expected in ((cos[0, 0, :, :32], angles.cos()), (sin[0, 0, :, 32:], angles.sin())):
        torch.testing.assert_close(got, expected * rope_magnitude(fields), atol=1e-11, rtol=0)


def test_dynamic_scaling_begins_beyond_the_context_and_ends_with_the_text():
    # transformers remembers its longest text until a short one comes; ours has no memory.
    rotary, _ = both(ROPE_SCALINGS["dynamic"])
    plain, _ = both(SCALINGS["none"])
    before = rotary(torch.arange(48)[None], torch.float64)
    longer = rotary(torch.arange(49)[None], torch.float64)
    assert not torch.equal(longer[0][:, :, :48], before[0])
    assert all(map(torch.equal, rotary(torch.arange(48)[None], torch.float64), before))
    for got, expected in zip(before, plain(torch.arange(48)[None], torch.float64), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_llama3_scaling_slows_only_long_waves():
    plain = inverse_frequencies(tiny_config(head_dim=64), torch.float64)
    scaled = inverse_frequencies(tiny_config(head_dim=64, rope_scaling=LLAMA3_SCALING), torch.float64)
    waves = 2 * math.pi / plain
    assert torch.equal(scaled[waves < 32 / 4], plain[waves < 32 / 4])
    torch.testing.assert_close(scaled[waves > 32], plain[waves > 32] / 8, rtol=1e-14, atol=0)
    between = (waves > 8) & (waves < 32)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_angles_survive_a_cast_of_the_whole_model():
    # A registered buffer would be rounded by .to(bfloat16): logits moved by 0.07.
    model = tiny_model().to(torch.bfloat16)
    positions = torch.arange(200)[None]
    expected = RotaryEmbedding(model.config)(positions, torch.float32)
    got = model.rotary(positions, torch.float32)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert not [name for name in model.state_dict() if "rotary" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_of_16_bit_activations_are_float32_until_the_end(dtype):
    # In bfloat16 position 257 would be 256, and the angle of 600 off by more than a radian.
    positions = torch.arange(2048)[None]
    for got, exact in zip(ROTARY(positions, dtype), ROTARY(positions, torch.float32), strict=True):
        assert torch.equal(got, exact.to(dtype))


def test_a_model_made_on_the_meta_device_has_its_angles():
    with torch.device("meta"):
        made = RotaryEmbedding(CONFIG)
    moved = RotaryEmbedding(CONFIG).to("meta").to_empty(device="cpu")
    positions = torch.arange(9)[None]
    for rotary in (made, moved):
        assert all(map(torch.equal, rotary(positions, torch.float64), ROTARY(positions, torch.float64)))


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_one_graph_serves_short_and_long_texts(kind):
    # A step recorded for the GPU may not ask on the CPU how long the text is.
    rotary, _ = both(ROPE_SCALINGS[kind])
    compiled = torch.compile(rotary, fullgraph=True, backend="eager", dynamic=True)
    for position in (3, 47, 48, 90):
        at = torch.tensor([[position]])
        assert all(map(torch.equal, compiled(at, torch.float32), rotary(at, torch.float32)))
