"""The guides keep their word: their Python runs and prints what they show, and their commands run."""

import functools
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.scripts.test_scripts import load_script
from tinyllama import Tokenizer
from tinyllama.cli import terminal
from tinyllama.lab import scorecard
from tinyllama.lab.kernel_file import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
# Measured errors vary with the machine; everything else must be as shown.
MEASURED = re.compile(r"-?\d+(\.\d+)?(e[+-]\d+)?")
BLOCK = re.compile(r"```(python|text|bash|sh)\n(.*?)```", re.DOTALL)
# Everything is run as it stands, but on less: later options win.
LESS = {
    "lab": "--tokens 16 --rounds 0 --new-tokens 1 --prompt Hello",
    "parity": "--quick --dtype float32 --text short.txt",
    "heal": "--steps 1 --batch 1 --length 16 --held-out 16 --layers 3",
}
SHORT = "for i in range(10): print(i)\n"
LESS_PYTHON = {
    r"\b1024\b": "16",
    r"(perplexity\(\[layer\]\) for layer in) range\(30\)": r"\1 range(5)",
    r'"layers\.\*\.self_attn\.z"\)  # \(L, H\)': '"layers.23.self_attn.z")',
}


@pytest.fixture
def read_once(monkeypatch):
    """A tokenizer is read once, not by each command; a contract is tried once for each kernel of ours."""
    from_folder = functools.cache(Tokenizer.from_folder)
    monkeypatch.setattr(Tokenizer, "from_folder", from_folder)
    check_attention, known = scorecard.check_attention, {}

    def check_once(kernel, *shape, layer):
        if not (isinstance(kernel, partial) and kernel.func in VARIANTS.values()):
            return check_attention(kernel, *shape, layer=layer)
        key = (kernel.func, *kernel.keywords.items(), *shape)
        if key not in known:
            known[key] = check_attention(kernel, *shape, layer=layer)
        return known[key]

    monkeypatch.setattr(scorecard, "check_attention", check_once)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_its_python_prints_what_it_shows_and_its_commands_run(
    guide, smollm2_folder, read_once, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text(SHORT, "utf-8")
    namespace, printed, shown = {}, "", 0
    for language, block in BLOCK.findall(guide.read_text("utf-8")):
        if language == "text":
            assert MEASURED.sub("#", printed) == MEASURED.sub("#", block)
            shown += 1
        elif language == "bash":
            for line in block.splitlines():
                run_command(line, monkeypatch)
            capsys.readouterr()
        elif language == "sh":  # takes minutes: its kernels and options are known, at least
            monkeypatch.setattr(sys, "argv", shlex.split(block)[1:])
            script = load_script("lab")
            assert script.read_changes(script.parse())
        else:
            if named := re.match(r"# file: (\S+)\n", block):
                (tmp_path / named[1]).write_text(block, "utf-8")
            for much, less in LESS_PYTHON.items():
                block = re.sub(much, less, block)
            exec(block, namespace)
            printed = capsys.readouterr().out
    assert shown


def run_command(line, monkeypatch):
    """`python scripts/name.py ...` in this process, any other by itself; it has to succeed."""
    python, script, *arguments = shlex.split(line)
    assert python == "python", line
    if not script.startswith("scripts/"):
        subprocess.run(f"{shlex.quote(sys.executable)} {line.removeprefix('python')}", shell=True, check=True)
        return
    name = Path(script).stem
    monkeypatch.setattr(sys, "argv", [script, *arguments, *shlex.split(LESS[name])])
    with pytest.raises(SystemExit) as exit:
        terminal.run(load_script(name).main)
    assert exit.value.code == 0, line


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_scripts_and_options_that_it_names_exist(guide):
    text = guide.read_text("utf-8")
    commands = re.findall(r"python (scripts/\w+\.py)([^`\n]*)", text)
    assert commands
    shared = (ROOT / "tinyllama" / "options.py").read_text("utf-8")
    for script, arguments in commands:
        source = (ROOT / script).read_text("utf-8") + shared
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in source, (script, option)
