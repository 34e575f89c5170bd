"""The README keeps its word: its Python runs, and the commands, files and targets that it names exist."""

import re
from pathlib import Path

import tinyllama

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(smollm2_folder, capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, namespace)
    assert capsys.readouterr().out.startswith("The capital of France is")
    assert [pattern.shape[-2:] for pattern in namespace["patterns"].values()] == [(5, 5)] * 30
    kernels = [layer.self_attn.kernel for layer in namespace["model"].layers]
    assert kernels == [tinyllama.eager] * 8 + [namespace["window"]] * 22


def test_the_files_and_targets_that_it_names_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= set(targets)
    named = re.findall(r"python (scripts/\w+\.py)", README) + re.findall(r"\]\((tinyllama/\w+\.py)\)", README)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_it_shows_every_script():
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == set(re.findall(r"scripts/(\w+\.py)", README))
