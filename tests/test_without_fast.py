"""Deleting tinyllama/fast leaves a slower project that works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.test_storage import IDS, write

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import sys, torch
import tinyllama
from tinyllama.checkpoints.load import load_model
from tinyllama.parity import suite

def load(**how):
    return load_model(sys.argv[1], device="cpu", dtype="float32", **how)

ids = torch.tensor([[int(one) for one in sys.argv[2].split(",")]])
with torch.no_grad():
    assert torch.equal(load(weights="stored")(ids), load(weights="exact")(ids))
new = tinyllama.generate(load(weights="stored"), ids.tolist(), max_new_tokens=5, eos_ids=())
for weights in ("int8", "bfloat16"):
    try:
        load(weights=weights)
    except tinyllama.InputError as error:
        assert "tinyllama/fast" in str(error)
    else:
        raise AssertionError(weights)
print(new[0])
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project without fast/ and its tests."""
    copy = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "fast")
    for folder in ("tinyllama", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    # An editable installation would still find the folder in the checkout.
    (copy / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [one for one in sys.meta_path if 'Editable' not in repr(one)]\n"
    )
    return copy


def run(copy: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_models_load_exactly_and_generate(copy: Path, tmp_path: Path):
    folder = write(tmp_path)
    ids = ",".join(map(str, IDS[0].tolist()))
    assert run(copy, "-c", WITHOUT, str(folder), ids).startswith("[")


def test_the_model_s_tests_pass(copy: Path):
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_attention.py", "tests/test_rope.py")
