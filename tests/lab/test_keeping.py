"""What a kernel keeps: its bytes are counted from the tensors that it attends by."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import tinyllama
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager, sdpa
from tinyllama.errors import InputError
from tinyllama.kernels import ByHead, kernel_name
from tinyllama.lab import breaks, check_attention, keeps, load_kernel
from tinyllama.lab.change import Change
from tinyllama.lab.effects import cache_needed
from tinyllama.lab.keeping import kept_bytes
from tinyllama.lab.kernel_file import load_kernels
from tinyllama.lab.smaller_caches import codes, quantised, regroup

B, H, K, S, D = 1, 8, 2, 12, 16
IDS = some_ids(1, 40)[0].tolist()
PLAIN = 2 * K * S * D * 4  # bytes in float32


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, S, D, generator=generator).to(dtype) for heads in (H, K, K)]


def halved(k, v, context, *, times=2):
    return k[..., ::times], v[..., ::times]


@keeps(halved)
def half_heads(q, kept, context, *, times=2):
    """Every second number of a head, twice."""
    return sdpa(q, *(x.repeat_interleave(times, dim=-1) for x in kept), context)


@pytest.mark.parametrize(
    ("kernel", "bytes"),
    [
        (eager, PLAIN),
        (half_heads, PLAIN / 2),
        (partial(half_heads, times=4), PLAIN / 4),
        (breaks("gradient")(half_heads), PLAIN / 2),
        (partial(breaks("gradient")(half_heads), times=4), PLAIN / 4),
        (regroup, PLAIN / 2),
        (partial(regroup, kv_heads=8), PLAIN * 4),
        # A token's key: 16 numbers of so many bits, and two of 16 bits.
        (quantised, 2 * K * S * (D * 4 / 8 + 4)),
        (partial(quantised, bits=2), 2 * K * S * (D * 2 / 8 + 4)),
        (partial(quantised, bits=8), 2 * K * S * (D + 4)),
        # Heads 0 to 3 read KV head 0, which both kernels need if some of these four have another.
        (ByHead(half_heads, [0, 1, 2, 3], eager), PLAIN * (1 / 2 * 1 / 2 + 1 / 2)),
        (ByHead(half_heads, [0], eager), PLAIN * (1 / 2 * 1 / 2 + 1)),
    ],
    ids=lambda value: kernel_name(value) if callable(value) else None,
)
def test_the_bytes_of_what_is_kept(kernel, bytes):
    assert kept_bytes(kernel, *inputs(), SimpleNamespace(heads=range(H))) == bytes


def test_a_kernel_attends_by_what_it_keeps_and_by_nothing_else():
    def nothing(k, v, context):
        return torch.zeros_like(k), torch.zeros_like(v)

    @keeps(nothing)
    def attend(q, kept, context):
        """Text."""
        return sdpa(q, *kept, context)

    model = tiny_model()
    model.set_attention(attend)
    without = tiny_model()
    without.set_attention("ablate")
    ids = torch.tensor([IDS])
    assert torch.allclose(model(ids), without(ids), atol=1e-6)
    assert (attend.__name__, attend.__doc__) == ("attend", "Text.")


def test_its_settings_are_those_of_its_kernel(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import tinyllama\nfrom tinyllama.lab import keeps\n"
        "def kept(k, v, context, *, size: int = 1): return k * size, v\n"
        "@keeps(kept)\n"
        "def f(q, kept, context, *, size: int = 1): return tinyllama.sdpa(q, *kept, context)\n"
    )
    assert load_kernel(f"{file}:f:size=3").keywords == {"size": 3}
    with pytest.raises(InputError, match="expected settings size, got 'kept'"):
        load_kernel(f"{file}:f:kept=3")
    assert check_attention(load_kernel(f"{file}:f"), longest=3).passed


def test_a_cache_is_the_bytes_of_the_keys_that_are_read():
    model = tiny_model()
    plain = cache_needed(model, IDS)
    assert (plain.of, plain.needed, plain.kept, plain.share) == (20, 1.0, 1.0, 1.0)
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert plain.bytes == 20 * a_token

    @keeps(halved)
    def half_window(q, kept, context):
        # A window of 4: of 20 tokens the later ones read the last 3.
        mask = context.mask
        near = mask.query_positions[:, None, :, None] - mask.key_positions[:, None, None, :] < 4
        return sdpa(q, *(x.repeat_interleave(2, dim=-1) for x in kept), context.where(near))

    with Change("x", half_window).applied(model):
        found = cache_needed(model, IDS)
    assert (found.needed, found.kept) == (pytest.approx(3 / 20), 0.5)
    assert found.share == pytest.approx(3 / 20 / 2)
    assert found.bytes == round(20 * a_token * 3 / 20 / 2)
    with Change("x", quantised).applied(model):
        rounded = cache_needed(model, IDS)
    assert (rounded.needed, rounded.share) == (None, rounded.kept)  # without a gradient all keys count


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_off_by_half_a_step_at_most(bits, dtype):
    q, k, v = inputs(dtype)
    seen = {}

    def spy(q, k, v, context):
        seen["k"], seen["v"] = k, v
        return q

    kept = codes(k, v, None, bits=bits)
    assert [part.dtype for part in kept[::3]] == [torch.uint8] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyllama.lab.smaller_caches.sdpa", spy)
        quantised(q, k, v, None, bits=bits)
    for name, x in (("k", k.double()), ("v", v.double())):
        span = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
        # Half a step, and what float16 does to its scale and bfloat16 to the result.
        slack = 2e-3 + (8e-3 if dtype == torch.bfloat16 else 0)
        assert ((seen[name].double() - x).abs() <= span * (0.5 / (2**bits - 1) + slack)).all()


def test_heads_of_one_number_are_kept_as_they_are():
    x = torch.full((1, 1, 3, 8), 0.5)
    packed, scale, low = codes(x, x, None)[:3]
    assert (packed == 0).all()
    assert (scale == 0).all()
    assert (low == 0.5).all()


@pytest.mark.parametrize(
    ("bits", "head_dim", "named"), [(3, 16, "bits"), (16, 16, "bits"), (2, 6, "head_dim")]
)
def test_bits_that_do_not_fill_bytes_are_refused(bits, head_dim, named):
    x = torch.zeros(1, 1, 3, head_dim)
    with pytest.raises(InputError, match=f"quantised: {named}: expected "):
        quantised(x, x, x, None, bits=bits)


def test_the_low_rank_example_is_right_at_full_rank_and_keeps_as_few_bytes_as_it_says(
    smollm2_folder, monkeypatch
):
    model, tokenizer = tinyllama.load(str(smollm2_folder), device="cpu", dtype="float32")
    model.layers = model.layers[:3]  # each has directions of its own; all thirty take ten times as long
    # The file loads the model by its name.
    monkeypatch.setattr(tinyllama, "load", lambda name, **how: {"smollm2": (model, tokenizer)}[name])
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 4)
    expected = model(torch.tensor([ids]))
    kernels = load_kernels(f"docs/kernels/low_rank.py:attend:rank={rank}" for rank in (384, 96))
    for kernel, share in zip(kernels.values(), (1.0, 0.25), strict=True):
        with Change("x", kernel).applied(model):
            assert cache_needed(model, ids).kept == share
            got = model(torch.tensor([ids]))
        if share == 1.0:
            assert torch.allclose(got, expected, atol=2e-3)
        else:  # 0.07 here; along other directions 0.3
            assert 0.01 < (got - expected).norm() / expected.norm() < 0.15
