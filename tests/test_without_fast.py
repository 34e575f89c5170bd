"""Deleting tinyllama/fast leaves a slower project that works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.checkpoints.test_storage import write

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import pytest, torch
import tinyllama
from tests.shapes import some_ids
from tinyllama.checkpoints.load import load_model
from tinyllama.parity import suite  # which judges fast modes, too

IDS = some_ids(1, 48)

def load(weights):
    return load_model("checkpoint", device="cpu", dtype="float32", weights=weights)

def test_models_load_exactly_and_generate():
    with torch.no_grad():
        assert torch.equal(load("stored")(IDS), load("exact")(IDS))
    (new,) = tinyllama.generate(load("stored"), IDS.tolist(), max_new_tokens=5, eos_ids=())
    assert len(new) == 5

@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_other_weights_are_refused(weights):
    with pytest.raises(tinyllama.InputError, match="tinyllama/fast"):
        load(weights)
"""


def test_models_load_and_generate_and_the_model_s_tests_pass(tmp_path: Path):
    ignored = shutil.ignore_patterns("__pycache__", "fast")
    for folder in ("tinyllama", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # An editable installation would still find the folder in the checkout.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [one for one in sys.meta_path if 'Editable' not in repr(one)]\n"
    )
    write(tmp_path / "checkpoint")
    (tmp_path / "tests" / "test_without.py").write_text(WITHOUT)
    # In one process: its imports take longer than its tests.
    tests = [f"tests/test_{name}.py" for name in ("without", "attention", "rope")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d{3} passed", done.stdout, re.MULTILINE), done.stdout
