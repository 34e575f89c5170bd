"""What you read is what runs: an edit of the model's Python changes the text of every weight mode alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import FunctionType

import pytest
import torch
from torch import Tensor

from tests.checkpoints.test_storage import write
from tests.fast.compiled import compiled
from tests.shapes import some_ids
from tinyllama.checkpoints.load import load_model
from tinyllama.fast import linear, norm
from tinyllama.fast.build import Build
from tinyllama.fast.claims import Claim
from tinyllama.generation import generate
from tinyllama.model import Llama, RMSNorm
from tinyllama.parity.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
PROMPT = some_ids(1, 24, seed=3)[0].tolist()
TOKENS = 16
pytestmark = [compiled, pytest.mark.usefixtures("one_thread")]

# One line of a file, what it becomes, and whether compiled norms may still run.
EDITS = {
    "GELU for SiLU": ("model.py", "F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", True),
    "gate and up swapped": (
        "model.py",
        "F.silu(self.gate_proj(x)) * self.up_proj(x)",
        "F.silu(self.up_proj(x)) * self.gate_proj(x)",
        True,
    ),
    "eps": ("model.py", "+ self.eps)", "+ 1000 * self.eps)", False),
    "LayerNorm for RMSNorm": (
        "model.py",
        "h = h * torch.rsqrt(",
        "h = (h - h.mean(-1, True)) * torch.rsqrt(",
        False,
    ),
    "weight + 1 in the norm": ("model.py", "return self.weight * h", "return (1 + self.weight) * h", False),
    "no norm before attention": (
        "model.py",
        "self.self_attn(self.input_layernorm(x)",
        "self.self_attn(0.5 * x",
        True,
    ),
    "last layer skipped": ("model.py", "for block in self.layers:", "for block in self.layers[:-1]:", True),
    "final norm skipped": ("model.py", "return self.norm(x)", "return x", True),
    "theta": ("rope.py", "config.rope_theta**", "(2 * config.rope_theta) ** ", True),
    "bf16 RoPE angles": (
        "rope.py",
        ".to(working) * frequencies",
        ".to(working) * frequencies.bfloat16()",
        True,
    ),
    "RoPE turns the other way": ("rope.py", "torch.cat((-sin, sin)", "torch.cat((sin, -sin)", True),
    "interleaved RoPE": ("rope.py", "x.roll(x.shape[-1] // 2, dims=-1)", "x.roll(1, dims=-1)", True),
    "values stored as keys": (
        "cache.py",
        "self.values[layer - self.first_layer]",
        "self.keys[layer - self.first_layer]",
        True,
    ),
    "scale": ("attention.py", "self.head_dim**-0.5", "0.05", True),
    "scale in sdpa": (
        "attention.py",
        "attn_mask=allowed, scale=context.scale",
        "attn_mask=allowed, scale=0.05",
        True,
    ),
    "mask leaks one token": ("attention.py", "<= queries[:, :, None])", "<= queries[:, :, None] + 1)", True),
    "KV heads tiled in sdpa": (
        "attention.py",
        "(q.reshape(B, K, -1, D), k, v,",
        "(q.reshape(B, K, -1, D), k.flip(1), v.flip(1),",
        True,
    ),
    "nothing": ("model.py", "return self.down_proj(", "# a remark\n        return self.down_proj(", True),
    "a local's name": (
        "attention.py",
        "(B, H, T, D), (_, K, S, _) = q.shape, k.shape",
        "(B, H, T, D), (_, K, S, _) = q.shape, k.shape\n    keys = k",
        True,
    ),
}

DRIVER = """
import json, sys, warnings
folder, prompt, tokens, *copies = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
found = {}
for copy in copies:
    for name in [name for name in sys.modules if name.split(".")[0] == "tinyllama"]:
        del sys.modules[name]
    sys.path.insert(0, copy)
    from tinyllama.checkpoints.load import load_model
    from tinyllama.fast import native
    from tinyllama.generation import generate
    ran = {"linear": 0, "rms_norm": 0}
    def counting(name, function):
        def call(*given, **how):
            ran[name] += 1
            return function(*given, **how)
        return call
    for name in ran:
        setattr(native, name, counting(name, getattr(native, name)))
    result = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for weights in ("exact", "stored"):
            model = load_model(folder, device="cpu", dtype="float32", weights=weights)
            ran.update(linear=0, rms_norm=0)
            result[weights] = generate(model, [prompt], max_new_tokens=tokens, eos_ids=())[0]
    found[copy] = result | {"ran": dict(ran), "said": [str(one.message) for one in said]}
    sys.path.pop(0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), head_dim=16)


@pytest.fixture(scope="module")
def edited(folder: Path, tmp_path_factory) -> dict[str, dict]:
    """What each edit of a copy of the package gave, all tried in one process."""
    assert linear.claim(torch.bfloat16, torch.float32).check(wait=120)
    assert norm.claim(torch.float32).check(wait=120)
    copies = {}
    for name, (file, old, new, _) in EDITS.items():
        copy = tmp_path_factory.mktemp("copy")
        shutil.copytree(ROOT / "tinyllama", copy / "tinyllama", ignore=shutil.ignore_patterns("__pycache__"))
        source = (copy / "tinyllama" / file).read_text()
        assert old in source, name
        (copy / "tinyllama" / file).write_text(source.replace(old, new))
        copies[name] = str(copy)
    given = json.dumps([str(folder), PROMPT, TOKENS, *copies.values()])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, given],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: found[copy] for name, copy in copies.items()}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_file_changes_both_modes_alike(name: str, edited: dict[str, dict]):
    got, unchanged = edited[name], edited["nothing"]["exact"]
    assert got["stored"] == got["exact"]
    harmless = name in ("nothing", "a local's name")
    assert (got["exact"] == unchanged) == harmless or name in ("mask leaks one token", "bf16 RoPE angles")
    keeps_norms = EDITS[name][3]
    assert got["ran"]["linear"] > 0
    assert (got["ran"]["rms_norm"] > 2 * TOKENS) == keeps_norms
    assert any("norms run as written in Python" in said for said in got["said"]) != keeps_norms


def both(folder: Path) -> list[Llama]:
    return [load_model(folder, device="cpu", dtype="float32", weights=kind) for kind in ("exact", "stored")]


def text(model: Llama) -> list[int]:
    return generate(model, [PROMPT], max_new_tokens=TOKENS, eos_ids=())[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_change_at_run_time_changes_both_modes_alike(mutation: Mutation, folder: Path):
    texts = []
    for model in both(folder):
        with torch.no_grad(), mutation.planted(model):
            texts.append(text(model))
    assert texts[0] == texts[1]


def negated(function):
    return lambda *args, **keywords: -function(*args, **keywords)


@pytest.mark.parametrize("name", ["linear", "scaled_dot_product_attention", "silu"])
def test_a_function_replaced_in_pytorch_is_honoured_and_comes_back(name: str, folder: Path, monkeypatch):
    exact, stored = both(folder)
    before = text(exact)
    monkeypatch.setattr(torch.nn.functional, name, negated(getattr(torch.nn.functional, name)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        changed = text(stored)
    assert changed == text(exact) != before
    products = [str(one.message) for one in said if "matrix products run as written" in str(one.message)]
    assert len(products) == (name == "linear")
    monkeypatch.undo()
    assert text(stored) == before
    assert linear.claim(torch.bfloat16, torch.float32).holds


def test_a_method_replaced_in_a_notebook_is_honoured_at_once(folder: Path, monkeypatch):
    exact, stored = both(folder)
    ids, before = torch.tensor([PROMPT]), text(exact)

    def forward(norm: RMSNorm, x: Tensor) -> Tensor:
        return norm.weight * x / x.norm(dim=-1, keepdim=True)

    monkeypatch.setattr(RMSNorm, "forward", forward)
    torch.testing.assert_close(stored(ids), exact(ids), atol=1e-5, rtol=0)  # no generation has begun
    with pytest.warns(UserWarning, match="norms run as written in Python"):
        assert text(stored) == text(exact) != before
    monkeypatch.undo()
    assert text(stored) == before


def test_new_code_in_an_old_function_is_honoured(folder: Path, monkeypatch):
    # IPython's autoreload gives functions that exist the code of an edited file.
    def forward(norm, x):
        return norm.weight * x.sign()

    assert isinstance(RMSNorm.forward, FunctionType)
    exact, stored = both(folder)
    before, code = text(exact), RMSNorm.forward.__code__
    try:
        RMSNorm.forward.__code__ = forward.__code__
        with pytest.warns(UserWarning, match="norms run as written in Python"):
            assert text(stored) == text(exact) != before
    finally:
        RMSNorm.forward.__code__ = code
    assert text(stored) == before


def test_what_the_compiler_gets_wrong_does_not_run(folder: Path):
    right = linear.claim(torch.bfloat16, torch.float32)
    wrong = Claim(
        "products run", right.build, right.trials, right.python, lambda *given: right.compiled(*given) * 1.001
    )
    with pytest.warns(UserWarning, match="products run as written in Python: the compiled code differs"):
        assert not wrong.check(wait=60)
    assert wrong.check() is False  # and it is said once
    nan = Claim(
        "products run",
        right.build,
        right.trials,
        right.python,
        lambda *given: right.compiled(*given) * torch.nan,
    )
    with pytest.warns(UserWarning, match="differs"):
        assert not nan.check()


def test_a_build_that_fails_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    right = linear.claim(torch.bfloat16, torch.float32)
    broken = Claim(
        "products run",
        Build(right.build.sources, ("-DNONSENSE",)),
        right.trials,
        right.python,
        right.compiled,
    )
    with pytest.warns(UserWarning, match="products run as written in Python: .*error") as said:
        assert not broken.check(wait=60)
    assert "\n" not in str(said[0].message)
    assert not list((tmp_path / "tinyllama").iterdir())
