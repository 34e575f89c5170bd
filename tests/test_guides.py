"""The guides keep their word: their Python runs, prints what they show, and their commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
# Measured errors vary with the machine; everything else must be as shown.
MEASURED = re.compile(r"-?\d+(\.\d+)?(e[+-]\d+)?")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_its_python_prints_what_it_shows(guide, smollm2_folder, capsys):
    namespace, printed, shown = {}, "", 0
    for language, block in re.findall(r"```(python|text)\n(.*?)```", guide.read_text("utf-8"), re.DOTALL):
        if language == "python":
            exec(block, namespace)
            printed = capsys.readouterr().out
        else:
            assert MEASURED.sub("#", printed) == MEASURED.sub("#", block)
            shown += 1
    assert shown


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_scripts_and_options_that_it_names_exist(guide):
    text = guide.read_text("utf-8")
    commands = re.findall(r"python (scripts/\w+\.py)([^`\n]*)", text)
    assert commands
    for script, arguments in commands:
        source = (ROOT / script).read_text("utf-8")
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in source, (script, option)
