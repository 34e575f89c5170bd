"""The guides are true: their Python prints what they show, and their commands run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.test_scripts import load_script
from tinyllama.cli import terminal
from tinyllama.lab import load_kernel

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```text" in path.read_text("utf-8"))
BLOCK = re.compile(r"```(python|text|bash|sh)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?%?")
# Commands run on less than the guide says: later options win.
LESS = {
    "lab": "--tokens 16 --rounds 0 --new-tokens 1 --prompt Hello",
    "parity": "--quick --dtype float32 --text short.txt",
    "heal": "--steps 1 --batch 1 --length 16 --held-out 16 --layers 3",
}
SHORT = "for i in range(10): print(i)\n"
# Python that takes long, a guide's own and that of the kernel files it names, is run on less too. Its numbers
# differ from those shown then, but those that the guide shows as equal, as two tools agree, must be equal.
LESS_PYTHON = {
    "attention-variants": {r"\[MEASURED:\]": "[:8]", r"encode\(code\)": "encode(code)[:8]"},
    "attention-lab": {
        r"\b1024\b": "16",
        r"(perplexity\(\[layer\]\) for layer in) range\(30\)": r"\1 range(5)",
    },
    "three-tools": {r"\b1024\b": "128", r"\b256\b": "32"},
}
# Rounding errors and times differ on every machine: of these guides only the text is compared.
MEASURED = {"different-logits", "performance"}


def assert_close(got, shown):
    """An integer exactly, another number within 1% or one unit of the last digit shown."""
    digits, _, exponent = shown.rstrip("%").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    tolerance = (
        0 if shown.isdigit() else max(0.01 * abs(float(digits)) * 10.0 ** int(exponent or 0), 1.01 * unit)
    )
    assert abs(float(got.rstrip("%")) - float(shown.rstrip("%"))) <= tolerance, (got, shown)


@pytest.fixture(scope="module")
def ran():
    """The scripts that measured a kernel for some guide: the next ones' commands are only read."""
    return set()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_its_python_prints_what_it_shows_and_its_commands_run(
    guide, smollm2_folder, ran, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text(SHORT, "utf-8")
    shutil.copytree(ROOT / "docs" / "kernels", tmp_path / "docs" / "kernels")
    for file in (tmp_path / "docs" / "kernels").glob("*.py"):
        file.write_text(on_less(guide, file.read_text("utf-8")), "utf-8")
    namespace, printed, shown, agreed, less = {}, "", 0, {}, False
    for language, block in BLOCK.findall(guide.read_text("utf-8")):
        if language == "text":
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", block)
            for got, expected in zip(NUMBER.findall(printed), NUMBER.findall(block), strict=True):
                if less:
                    assert_close(got, agreed.setdefault(expected, got))
                elif guide.stem not in MEASURED:
                    assert_close(got, expected)
            shown += 1
        elif language in ("bash", "sh"):
            for line in block.splitlines():
                run_command(line, monkeypatch, ran, only_read=language == "sh")
            capsys.readouterr()
        else:
            if named := re.match(r"# file: (\S+)\n", block):
                (tmp_path / named[1]).write_text(block, "utf-8")
            code = on_less(guide, block)
            less = code != block
            exec(code, namespace)
            printed = capsys.readouterr().out
    assert shown


def on_less(guide, code):
    """The code with what takes long made small, as in LESS_PYTHON."""
    for much, little in LESS_PYTHON.get(guide.stem, {}).items():
        code = re.sub(much, little, code)
    return code


def run_command(line, monkeypatch, ran, only_read):
    """Run `python scripts/name.py ...` in this process, any other in its own; it has to succeed.

    Of the kernels that the guides measure, and of those that they train, only the first one's command runs,
    which takes seconds. The kernels and options of the others are read. `sh` blocks take minutes and are only
    read too.
    """
    python, script, *arguments = shlex.split(line)
    assert python == "python", line
    if not script.startswith("scripts/"):
        subprocess.run(f"{shlex.quote(sys.executable)} {line.removeprefix('python')}", shell=True, check=True)
        return
    name = Path(script).stem
    measures = name in ("lab", "heal") and not {"--addresses", "--capture"} & set(arguments)
    monkeypatch.setattr(sys, "argv", [script, *arguments, *shlex.split(LESS[name])])
    if only_read or (measures and name in ran):
        script = load_script(name)
        args = script.parse()
        assert script.read_changes(args) if name == "lab" else load_kernel(args.kernel), line
        return
    ran |= {name} if measures else set()
    with pytest.raises(SystemExit) as exit:
        terminal.run(load_script(name).main)
    assert exit.value.code == 0, line


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_scripts_and_options_that_it_names_exist(guide):
    commands = re.findall(r"python (scripts/\w+\.py)([^`\n]*)", guide.read_text("utf-8"))
    assert commands
    shared = (ROOT / "tinyllama" / "cli" / "options.py").read_text("utf-8")
    for script, arguments in commands:
        source = (ROOT / script).read_text("utf-8") + shared
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in source, (script, option)
