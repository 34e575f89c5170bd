"""Layers that keep their weights in 16 or 8 bits, and the compiled products under them, against float64."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyllama.fast import native
from tinyllama.fast.linear import FastLinear, Int8Linear, quantise

DTYPES = ("float32", "bfloat16", "float16", "int8")
compiled = pytest.mark.skipif(not native.available(), reason="needs gcc")
pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(rows: int, cols: int, dtype: str, seed: int = 0) -> FastLinear:
    weight = random(rows, cols, seed=seed)
    return Int8Linear(*quantise(weight)) if dtype == "int8" else FastLinear(weight.to(getattr(torch, dtype)))


def wide(linear: FastLinear) -> Tensor:
    """The weights that it stands for, exactly."""
    return linear.widened(slice(None), torch.float64)


def assert_is_the_product(y: Tensor, weight: Tensor, x: Tensor) -> None:
    """Within what float32 sums can differ from exact ones: half a unit for each operation on each term."""
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    bound = terms * (weight.shape[1] + 2) * 2.0**-24 + 1e-30
    assert ((y.double() - exact).abs() <= bound).all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.sampled_from([64, 128, 192, 576, 960, 1024, 1088, 2112]),
    st.one_of(st.integers(1, native.FEW + 1), st.integers(60, 70), st.just(native.VECTORS + 1)),
)
def test_it_is_the_linear_function(dtype: str, rows: int, cols: int, n: int):
    linear, x = layer(rows, cols, dtype), random(n, cols, seed=1)
    assert_is_the_product(linear(x), wide(linear), x)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 80),
    st.sampled_from([64, 128, 192, 576, 1088, 2112, 2944]),
    st.one_of(st.integers(1, 70), st.just(native.VECTORS + 1)),
)
def test_of_bfloat16_vectors_it_is_rounded_once(dtype: str, rows: int, cols: int, n: int):
    linear, x = layer(rows, cols, dtype), random(n, cols, seed=1).bfloat16()
    y = native.linear(linear.weight, linear.scales, x)
    # Weights of other kinds are rounded as well, where the processor multiplies bfloat16 numbers.
    weights = [wide(linear), linear.widened(slice(None), torch.bfloat16).double()]
    off = []
    for weight in weights:
        exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        off.append((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + terms * (cols + 2) * 2.0**-23)
    assert off[0].all() or off[1].all()


@compiled
@pytest.mark.parametrize("n", [1, native.FEW + 1])
def test_bfloat16_results_are_the_nearest_and_of_two_the_even_one(n: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (70, 128), generator=generator).bfloat16()
    x = torch.randint(-128, 129, (n, 128), generator=generator).bfloat16()
    exact = x.float() @ weight.float().T  # whole numbers of up to 14 bits, of which bfloat16 has 8
    assert torch.equal(native.linear(weight, None, x), exact.bfloat16())


@compiled
@pytest.mark.parametrize("flags", [("-O3",), ("-O3", "-mavx2", "-mfma", "-mf16c"), ("-O1", "-march=native")])
def test_every_kind_of_processor_gets_the_same_product(flags: tuple[str, ...], monkeypatch):
    # The source has code for AVX-512, for AVX2, and for any other machine.
    if "-mavx2" in flags and "avx2" not in native.CPUINFO.read_text():
        pytest.skip("this machine has no AVX2")
    monkeypatch.setattr(native, "FLAGS", (*flags, "-fPIC", "-fopenmp"))
    monkeypatch.setattr(native, "BUILDS", [build for build in native.BUILDS if build[0] != "step"])
    _forget()
    try:
        for dtype, n in product(DTYPES, (5, 77)):  # each of the two products
            linear, x = layer(69, 1088, dtype), random(n, 1088, seed=1)
            assert_is_the_product(linear(x), wide(linear), x)
            x = x.bfloat16()
            y, exact = linear(x).double(), x.double() @ wide(linear).T
            assert (y - exact).norm() <= 4e-3 * exact.norm(), (dtype, n)
    finally:
        _forget()


@compiled
@pytest.mark.parametrize("activations", native.STEP_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(
    dtype: str, activations: torch.dtype
):
    # So that a row alone is the row in a batch, and a checked guess the id that it would have been.
    linear, x = layer(101, 1088, dtype), random(native.FEW, 1088, seed=1).to(activations)
    alone = torch.cat([linear(one[None]) for one in x])
    for n in range(2, native.FEW + 1):
        assert torch.equal(linear(x[:n]), alone[:n]), n
    torch.set_num_threads(2)
    assert torch.equal(linear(x[:1]), alone[:1])
    assert torch.equal(linear(x), alone)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_vectors_give_the_same_bits_on_any_number_of_threads(dtype: str):
    linear, x = layer(200, 1088, dtype), random(90, 1088, seed=1)
    alone = linear(x)
    torch.set_num_threads(2)
    assert torch.equal(linear(x), alone)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is(dtype: str):
    linear, x = layer(70, 128, dtype), random(40, 128, seed=1)
    x[5, 100] = torch.nan
    for y in (linear(x), linear(x[:7])):
        assert y[5].isnan().all()
        assert torch.cat((y[:5], y[6:])).isfinite().all()


BEYOND = """
import ctypes, mmap, torch
from tinyllama.fast import native

for dtype in native.DTYPES:
    rows, cols = 17, mmap.PAGESIZE // dtype.itemsize
    memory = mmap.mmap(-1, (rows + 1) * mmap.PAGESIZE)
    memory[:] = bytes(len(memory))
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + rows * mmap.PAGESIZE
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, no_access) == 0
    weight = torch.frombuffer(memory, dtype=dtype, count=rows * cols).view(rows, cols)
    scales = torch.ones(rows, cols // native.GROUP, dtype=torch.bfloat16) if dtype == torch.int8 else None
    for activations in native.STEP_DTYPES:
        for n in (1, 2, 5, native.FEW + 1):
            assert not native.linear(weight, scales, torch.ones(n, cols, dtype=activations)).any()
print("done")
"""


@compiled
def test_nothing_is_read_beyond_the_matrix():
    # It may be the end of a mapped file: reading on would kill the process.
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_activations_go_to_pytorch_where_the_processor_multiplies_them(
    multiplies: bool, dtype: str, monkeypatch
):
    # Elsewhere PyTorch takes several times as long as float32 does.
    monkeypatch.setattr(native, "pytorch_is_faster", lambda dtype: multiplies)
    monkeypatch.setattr(native, "available", lambda: True)
    vectors = []

    def matmul(weight: Tensor, scales: Tensor | None, x: Tensor) -> Tensor:
        vectors.append(len(x))
        return x[:, :48]

    monkeypatch.setattr(native, "matmul", matmul)
    linear, x = layer(48, 128, dtype), random(native.FEW + 1, 128).bfloat16()
    assert linear(x).dtype == torch.bfloat16
    assert vectors == ([] if multiplies else [native.FEW + 1])


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ("flags : avx512f avx512_bf16", False),
        ("flags : avx512_bf16 amx_bf16 amx_tile", True),
        ("Features : asimd bf16", True),
        ("flags : avx512f", False),
        (None, False),
    ],
)
def test_what_a_processor_multiplies_is_read_from_its_flags(
    flags: str | None, faster: bool, tmp_path, monkeypatch
):
    monkeypatch.setattr(native, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        native.CPUINFO.write_text(flags + "\nmodel name : bf16 avx512_bf16\n")
    native.pytorch_is_faster.cache_clear()
    assert native.pytorch_is_faster(torch.bfloat16) == faster
    assert not native.pytorch_is_faster(torch.float32)
    native.pytorch_is_faster.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 40), (0, 1)])
def test_activations_keep_their_dtype_and_shape(shape: tuple[int, ...], activations: torch.dtype, dtype: str):
    linear, x = layer(48, 128, dtype), random(*shape, 128, seed=1).to(activations)
    y = linear(x)
    assert y.shape == (*shape, 48)
    assert y.dtype == activations
    exact = x.double() @ wide(linear).T
    # The criteria's ceilings for the compute dtype, on relRMS; 8 bits widened to 16 are rounded once more.
    ceiling = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
    assert (y.double() - exact).norm() <= ceiling[activations] * exact.norm()


def test_rows_of_any_length_work():
    # What is not a multiple of 64 goes through PyTorch.
    linear, x = FastLinear(random(48, 96).bfloat16()), random(1, 96, seed=1)
    assert_is_the_product(linear(x), wide(linear), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, native.FEW + 1])
def test_gradients_reach_the_input(dtype: str, n: int):
    # Captured values can have gradients in a fast model, too; its weights cannot.
    linear, x = layer(48, 128, dtype), random(n, 128, seed=1).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wide(linear).sum(0).float().expand(n, -1), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 4), st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_8_bits_are_off_by_half_a_step_at_most(rows: int, groups: int, scale: float, seed: int):
    weight = random(rows, 64 * groups, seed=seed) * scale
    weight[0, :64] = 0  # a group without any scale
    values, scales = quantise(weight)
    assert values.dtype == torch.int8
    assert scales.shape == (rows, groups)
    assert values.abs().max() <= 127
    back = Int8Linear(values, scales).widened(slice(None), torch.float64)
    steps = scales.double().repeat_interleave(64, dim=1)
    # A scale that bfloat16 rounded down clips its group's largest: by 127 / 256 of a step at most.
    assert ((back - weight.double()).abs() <= steps * 0.5001).all()
    assert (back[0, :64] == 0).all()


def test_the_group_s_largest_weight_sets_its_scale_and_no_other_s():
    weight = random(4, 192)
    louder = weight.clone()
    louder[2, 70] = 100.0
    (values, scales), (other_values, other_scales) = quantise(weight), quantise(louder)
    changed = torch.zeros(4, 3, dtype=torch.bool)
    changed[2, 1] = True
    assert torch.equal(scales != other_scales, changed)
    assert torch.equal((values != other_values).unflatten(1, (3, 64)).any(-1), changed)


def _forget() -> None:
    for function in (native.available, native._operation, native._library):
        function.cache_clear()


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """No product was ever built here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _forget()
    yield tmp_path
    _forget()


@pytest.mark.parametrize(
    ("what", "reason"), [("none", "no C compiler was found"), ("broken", "error"), ("hangs", "timed out")]
)
def test_without_a_compiler_pytorch_s_products_serve_and_that_is_said_once(
    unbuilt, what: str, reason: str, monkeypatch
):
    def run(command: list[str], **_: object) -> None:
        if what == "hangs":
            raise subprocess.TimeoutExpired(command, 60)
        raise subprocess.CalledProcessError(1, command, stderr="matvec.c:1: error: what is this\nmore\n")

    monkeypatch.setattr(native.subprocess, "run", run)
    if what == "none":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    linear, x = layer(48, 128, "int8"), random(1, 128, seed=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_is_the_product(linear(x), wide(linear), x)
    (warning,) = said
    assert reason in str(warning.message)
    assert "\n" not in str(warning.message)


@compiled
def test_it_is_built_once_and_a_broken_build_leaves_nothing(unbuilt, monkeypatch):
    monkeypatch.setattr(native, "BUILDS", native.BUILDS[1::8])  # one of each source
    calls = []
    right = subprocess.run

    def run(command: list[str], **how: object) -> object:
        calls.append(command)
        return right(command, **how)

    monkeypatch.setattr(native.subprocess, "run", run)
    assert native.available()
    built = sorted((unbuilt / "tinyllama").iterdir())
    assert len(built) == len(native.BUILDS)
    sources = [file.name.partition("-")[0] for file in built if file.suffix == ".so"]
    assert sources == ["matmul", "matvec", "step"]
    calls.clear()
    _forget()
    assert native.available()
    assert not calls


@compiled
def test_an_unlike_machine_gets_a_build_of_its_own(unbuilt, monkeypatch):
    # A home folder may be shared: code for the one processor would kill the process on the other.
    names = []
    for flags in ("flags: avx2", "flags: avx2 avx512f", "flags: avx2"):
        cpuinfo = unbuilt / "cpuinfo"
        cpuinfo.write_text(flags)
        monkeypatch.setattr(native, "CPUINFO", cpuinfo)
        names.append(native._built("gcc", "matvec", "-DINT8").name)
    assert [a == b for a, b in pairwise(names)] == [False, False]
    assert names[0] == names[2]
