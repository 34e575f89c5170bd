"""The C reads and writes nothing but what it was given, and computes the same on an ARM processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fast.compiled import compiled
from tinyllama.fast.build import GROUP, SOURCES

EXERCISE = Path(__file__).with_name("exercise.c")
DTYPES = [("INT8", "FLOAT32"), ("FLOAT16", "FLOAT32"), ("BFLOAT16", "BFLOAT16")]
pytestmark = compiled


def exercised(folder: Path, *compiler: str, dtypes: tuple[str, str], runner: tuple[str, ...] = ()) -> None:
    """Compile the exercise and run it; skips where the compiler lacks what is asked for."""
    if shutil.which(compiler[0]) is None or (runner and shutil.which(runner[0]) is None):
        pytest.skip(f"needs {' and '.join([compiler[0], *runner])}")
    program = folder / "exercise"
    weights, activations = dtypes
    line = [*compiler, "-O1", f"-DGROUP={GROUP}", f"-D{weights}", f"-DX_{activations}", f"-I{SOURCES}"]
    sources = [str(SOURCES / f"{name}.c") for name in ("matvec", "matmul", "norm")]
    made = subprocess.run(
        [*line, *sources, str(EXERCISE), "-lm", "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in made.stderr:  # the sanitizers are packages of their own
        pytest.skip(made.stderr.splitlines()[0])
    assert made.returncode == 0, made.stderr
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("dtypes", DTYPES)
def test_random_calls_are_clean_under_sanitizers(tmp_path: Path, dtypes: tuple[str, str]):
    exercised(tmp_path, "gcc", "-march=native", "-fsanitize=address,undefined", dtypes=dtypes)


def test_it_runs_with_a_stack_that_is_as_small_as_a_thread_s_can_be(tmp_path: Path):
    exercised(
        tmp_path, "gcc", "-march=native", dtypes=DTYPES[0], runner=("sh", "-c", 'ulimit -s 128 && "$0"')
    )


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-gcc", "clang"])
def test_an_arm_processor_computes_the_same(tmp_path: Path, compiler: str):
    target = ["--target=aarch64-linux-gnu"] if compiler == "clang" else []
    if not shutil.which("aarch64-linux-gnu-gcc"):
        pytest.skip("needs a cross compiler")
    exercised(tmp_path, compiler, *target, "-static", dtypes=DTYPES[0], runner=("qemu-aarch64",))
