"""Compiled matrix products, and the layers that keep their weights in 16 or 8 bits, against float64."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fast.compiled import FLAGS, compiled, needs
from tinyllama.fast import build, compiler, linear, native, norm
from tinyllama.fast.linear import FastLinear, Int8Linear, SplitLinear, quantise, widened
from tinyllama.model import RMSNorm

DTYPES = ("float32", "bfloat16", "float16", "int8")
# More vectors than matmul.c packs at once.
MORE = 513
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """Every product is there and found right, where there is a compiler."""
    for weights, activations in product(native.WEIGHTS, native.ACTIVATIONS):
        linear.claim(weights, activations).check(wait=120)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(rows: int, cols: int, dtype: str, seed: int = 0) -> FastLinear:
    weight = random(rows, cols, seed=seed)
    return Int8Linear(*quantise(weight)) if dtype == "int8" else FastLinear(weight.to(getattr(torch, dtype)))


def exact_weights(layer: FastLinear, dtype: torch.dtype = torch.float64) -> Tensor:
    return widened(layer.weight, layer.scales, slice(None), dtype)


def assert_is_the_product(y: Tensor, weight: Tensor, x: Tensor) -> None:
    """Within what float32 sums can differ from exact ones: half a unit for each operation on each term."""
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    bound = terms * (weight.shape[1] + 2) * 2.0**-24 + 1e-30
    assert ((y.double() - exact).abs() <= bound).all()


@compiled
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(
    st.integers(1, 80),
    st.sampled_from([64, 128, 192, 576, 1024, 1088, 2112, 2944]),
    st.one_of(st.integers(1, native.FEW + 1), st.integers(60, 70), st.just(MORE)),
)
def test_float32_products_are_exact_within_rounding(dtype: str, plain: bool, rows: int, cols: int, n: int):
    fast, x = layer(rows, cols, dtype), random(n, cols, seed=1)
    n = min(n, 40) if plain else n
    assert_is_the_product(
        native.linear(fast.weight, fast.scales, x[:n], plain=plain), exact_weights(fast), x[:n]
    )


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(
    st.integers(1, 80),
    st.sampled_from([64, 192, 576, 1088, 2944]),
    st.one_of(st.integers(1, 70), st.just(MORE)),
)
def test_bfloat16_products_are_rounded_once(dtype: str, rows: int, cols: int, n: int):
    fast, x = layer(rows, cols, dtype), random(n, cols, seed=1).bfloat16()
    y = native.linear(fast.weight, fast.scales, x)
    # Where the processor multiplies bfloat16 numbers, weights of other kinds are rounded to them first.
    off = []
    for weight in (exact_weights(fast), exact_weights(fast, torch.bfloat16).double()):
        exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        off.append((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + terms * (cols + 2) * 2.0**-23)
    assert off[0].all() or off[1].all()


@compiled
@pytest.mark.parametrize("n", [1, native.FEW + 1])
def test_bfloat16_results_are_rounded_to_nearest_ties_to_even(n: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (70, 128), generator=generator).bfloat16()
    x = torch.randint(-128, 129, (n, 128), generator=generator).bfloat16()
    exact = x.float() @ weight.float().T  # whole numbers of up to 14 bits, of which bfloat16 has 8
    assert torch.equal(native.linear(weight, None, x), exact.bfloat16())


@compiled
@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_the_code_for_every_kind_of_processor_gives_the_same_product(flags: tuple[str, ...], monkeypatch):
    # The source has code for AVX-512, for AVX2, and for any other machine.
    needs(flags)
    for dtype, activations in (("bfloat16", torch.float32), ("int8", torch.bfloat16)):
        fast = layer(69, 1088, dtype)
        one = build.products(fast.weight.dtype, activations)
        other = build.Build(one.sources, one.defines, flags)
        assert other.ready(wait=120)
        monkeypatch.setattr(build, "products", lambda *dtypes, other=other: other)
        for n in (5, 77):  # matvec.c and matmul.c
            x = random(n, 1088, seed=1).to(activations)
            y = native.linear(fast.weight, fast.scales, x)
            if activations == torch.float32:
                assert_is_the_product(y, exact_weights(fast), x)
            exact = x.double() @ exact_weights(fast).T
            assert (y.double() - exact).norm() <= 4e-3 * exact.norm()
        monkeypatch.undo()


@compiled
@pytest.mark.parametrize("activations", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(
    dtype: str, activations: torch.dtype
):
    # So a row alone equals the row in a batch, and a checked guess gives the id of a plain step.
    fast, x = layer(101, 1088, dtype), random(native.FEW, 1088, seed=1).to(activations)

    def multiply(x: Tensor) -> Tensor:
        return native.linear(fast.weight, fast.scales, x)

    alone = torch.cat([multiply(one[None]) for one in x])
    for n in (2, 3, 5, 8, 15, native.FEW):
        assert torch.equal(multiply(x[:n]), alone[:n]), n
    many = multiply(random(90, 1088, seed=2).to(activations))
    torch.set_num_threads(2)
    assert torch.equal(multiply(x), alone)
    assert torch.equal(multiply(random(90, 1088, seed=2).to(activations)), many)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is(dtype: str):
    fast, x = layer(70, 128, dtype), random(40, 128, seed=1)
    x[5, 100] = torch.nan
    for y in (fast(x), fast(x[:7])):
        assert y[5].isnan().all()
        assert torch.cat((y[:5], y[6:])).isfinite().all()


BEYOND = """
import ctypes, mmap, torch
from tinyllama.fast import build, native

for dtype in native.WEIGHTS:
    rows, cols = 17, mmap.PAGESIZE // dtype.itemsize
    memory = mmap.mmap(-1, (rows + 1) * mmap.PAGESIZE)
    memory[:] = bytes(len(memory))
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + rows * mmap.PAGESIZE
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, no_access) == 0
    weight = torch.frombuffer(memory, dtype=dtype, count=rows * cols).view(rows, cols)
    scales = torch.ones(rows, cols // build.GROUP, dtype=torch.bfloat16) if dtype == torch.int8 else None
    for activations in native.ACTIVATIONS:
        assert build.products(dtype, activations).ready(wait=120)
        for n in (1, 2, 5, native.FEW + 1):
            assert not native.linear(weight, scales, torch.ones(n, cols, dtype=activations)).any()
print("done")
"""


@compiled
def test_nothing_is_read_beyond_the_matrix():
    # A matrix may end where a mapped file does: reading on would kill the process.
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_what_does_not_fit_is_refused_before_it_reaches_c():
    weight, x = torch.zeros(8, 128), torch.zeros(2, 128)
    values, scales = quantise(weight)
    for bad in (
        (weight, None, x[:, :64]),
        (weight[:, :100].contiguous(), None, x[:, :100]),
        (weight.t().contiguous().t(), None, x),
        (weight, scales, x),
        (values, None, x),
        (values, scales[:4], x),
        (values, scales.float(), x),
        (values, scales[:, :1], x),
        (weight.double(), None, x),
        (weight, None, x.double()),
        (weight, None, x.int()),
        (weight.to("meta"), None, x),
        (weight, None, x.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"cannot multiply|scales"):
            native.linear(*bad)


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("n", [1, native.FEW + 1])
def test_many_bfloat16_vectors_go_to_pytorch_only_where_it_is_faster(faster: bool, n: int, monkeypatch):
    monkeypatch.setattr(native, "pytorch_is_faster", lambda dtype: faster)
    held = linear.claim(torch.bfloat16, torch.bfloat16).holds
    fast, x = layer(48, 128, "bfloat16"), torch.zeros(n, 128, dtype=torch.bfloat16)
    assert fast.uses_compiled(x) == (held and (n == 1 or not faster))


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ("flags : avx512f avx512_bf16", False),
        ("flags : avx512_bf16 amx_bf16 amx_tile", True),
        ("Features : asimd bf16", True),
        (None, False),
    ],
)
def test_what_a_processor_multiplies_is_read_from_its_flags(
    flags: str | None, faster: bool, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiler, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        compiler.CPUINFO.write_text(flags + "\nmodel name : bf16 avx512_bf16\n")
    assert native.pytorch_is_faster.__wrapped__(torch.bfloat16) == faster
    assert not native.pytorch_is_faster.__wrapped__(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 40), (0, 1)])
def test_activations_keep_their_dtype_and_shape(shape: tuple[int, ...], activations: torch.dtype, dtype: str):
    fast, x = layer(48, 128, dtype), random(*shape, 128, seed=1).to(activations)
    y = fast(x)
    assert y.shape == (*shape, 48)
    assert y.dtype == activations
    exact = x.double() @ exact_weights(fast).T
    # The criteria's ceilings for the compute dtype, on relRMS.
    ceiling = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
    assert (y.double() - exact).norm() <= ceiling[activations] * exact.norm()


def test_rows_that_are_no_multiple_of_64_go_through_pytorch():
    fast, x = FastLinear(random(48, 96).bfloat16()), random(1, 96, seed=1)
    assert not fast.uses_compiled(x)
    assert_is_the_product(fast(x), exact_weights(fast), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, native.FEW + 1])
def test_gradients_reach_the_input(dtype: str, n: int):
    # Captured values can have gradients in a fast model, too; its weights cannot.
    fast, x = layer(48, 128, dtype), random(n, 128, seed=1).requires_grad_()
    fast(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, exact_weights(fast).sum(0).float().expand(n, -1), atol=1e-4, rtol=1e-4)


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 4), st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_8_bits_are_off_by_half_a_step_at_most(rows: int, groups: int, scale: float, seed: int):
    weight = random(rows, 64 * groups, seed=seed) * scale
    weight[0, :64] = 0  # a group without any scale
    values, scales = quantise(weight)
    assert values.dtype == torch.int8
    assert scales.shape == (rows, groups)
    back = exact_weights(Int8Linear(values, scales))
    steps = scales.double().repeat_interleave(64, dim=1)
    # A scale that bfloat16 rounded down clips its group's largest: by 127 / 256 of a step at most.
    assert ((back - weight.double()).abs() <= steps * 0.5001).all()
    assert (back[0, :64] == 0).all()
    # All 8 bits are used: the largest of a group is 127 steps, but for the rounding of the scale.
    largest = values.unflatten(1, (groups, 64)).abs().amax(-1)
    assert (largest[scales != 0] >= 126).all()
    assert (largest <= 127).all()
    relative = (
        weight.double().unflatten(1, (groups, 64)).abs().amax(-1)[scales != 0] / scales.double()[scales != 0]
    )
    assert ((relative - 127).abs() <= 127 * 2.0**-8).all()


def test_a_weight_sets_the_scale_of_its_own_group_only():
    weight = random(4, 192)
    louder = weight.clone()
    louder[2, 70] = 100.0
    (values, scales), (other_values, other_scales) = quantise(weight), quantise(louder)
    changed = torch.zeros(4, 3, dtype=torch.bool)
    changed[2, 1] = True
    assert torch.equal(scales != other_scales, changed)
    assert torch.equal((values != other_values).unflatten(1, (3, 64)).any(-1), changed)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cols", [8, 24, 32, 64, 576, 2048])
def test_a_split_product_has_the_bits_of_pytorch_s(cols: int, threads: int):
    torch.set_num_threads(threads)
    for rows, shape in ((1, (1,)), (48, (1, 1)), (320, ()), (1024, (1, 1)), (320, (2, 1)), (1536, (1, 7))):
        split = SplitLinear(cols, rows, bias=False)
        split.weight = nn.Parameter(random(rows, cols, seed=rows))
        x = random(*shape, cols, seed=1)
        with torch.no_grad():
            assert torch.equal(split(x), F.linear(x, split.weight)), (rows, shape)


def test_gradients_flow_through_a_split_product():
    split, x = SplitLinear(96, 48, bias=False), random(1, 1, 96).requires_grad_()
    split(x).square().sum().backward()
    weight, vector = split.weight.detach(), x.detach().flatten()
    y = weight @ vector
    torch.testing.assert_close(split.weight.grad, 2 * y[:, None] * vector[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.flatten(), 2 * weight.T @ y, atol=1e-5, rtol=1e-5)


# --- norms -----------------------------------------------------------------------------------------------

# Half a unit in the last place for each of a few roundings.
UNIT = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7}


@compiled
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", native.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (3, 100), (40, 576), (0, 64)])
def test_a_compiled_norm_is_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, plain: bool):
    assert norm.claim(dtype).check(wait=120)
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype)
    for scale in (1.0, 1e-3):  # of small numbers eps is a part
        wide = scale * x.double()
        exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        y = native.rms_norm((scale * x).to(dtype), weight, 1e-5, plain=plain)
        assert y.dtype == dtype
        rounding = 2 * UNIT[dtype]  # of the scaled input and of the result
        assert ((y.double() - exact).abs() <= exact.abs() * rounding + 1e-30).all()


@compiled
def test_a_compiled_norm_leaves_gradients_and_other_dtypes_to_pytorch():
    fast = RMSNorm(64, 1e-5)
    fast.__class__ = norm.FastRMSNorm
    fast(torch.ones(1, 64)).sum().backward()
    assert fast.weight.grad is not None
    assert fast.half()(torch.ones(1, 64).half()).dtype == torch.float16
    assert native.rms_norm(torch.full((1, 64), torch.nan), torch.ones(64), 1e-5).isnan().all()
    for x, weight in (
        (torch.ones(2, 64), torch.ones(63)),
        (torch.ones(2, 64), torch.ones(64).bfloat16()),
        (torch.ones(2, 64).double(), torch.ones(64).double()),
        (torch.ones(2, 64, device="meta"), torch.ones(64)),
    ):
        with pytest.raises(ValueError, match="cannot normalise"):
            native.rms_norm(x, weight, 1e-5)
