"""`learn.py` at a terminal: the skeleton, what is right, what was right before, and hints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.learn.solutions import matrices
from tests.scripts.test_scripts import load_script, write_checkpoint
from tinyllama.cli import terminal


@pytest.fixture
def learn(monkeypatch, capsys, tmp_path):
    """Run the script; gives its status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["learn.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            terminal.run(load_script("learn").main)
        return ended.value.code, "".join(capsys.readouterr())

    return run


def test_a_learner_s_way(learn, tmp_path):
    folder, mine = tmp_path / "model", tmp_path / "mine.py"
    folder.mkdir()
    write_checkpoint(folder)
    assert learn("start", "mine.py")[0] == 0
    status, said = learn("check", "mine.py")
    assert (status, said.count("not written yet")) == (0, 10)
    source = Path(matrices.__file__).read_text("utf-8")
    mine.write_text(source, "utf-8")
    status, said = learn("check", "mine.py", "rope", "swiglu", "--model", str(folder))
    assert status == 0
    assert "With rope, swiglu of yours" in said
    assert "2 of 10 are right" in said
    mine.write_text(source.replace("@ down.T", "@ down.T.exp()"), "utf-8")
    status, said = learn("check", "mine.py", "swiglu")
    assert status == 1
    assert "right at the last check, and not now: swiglu" in said
    assert "1 of 10 are right" in said
    assert learn("hint", "mine.py", "swiglu")[1].endswith("(3 more: ask again)\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("hint", "mine.py"), "name one function"),
        (("check", "none.py"), "no such file"),
        (("check", "broken.py"), "broken.py:2: ZeroDivisionError"),
        (("check", "unparsed.py"), "SyntaxError"),
        (("check", "mine.py", "roap"), "has no function 'roap'"),
    ],
)
def test_what_cannot_be_judged_is_one_line(learn, arguments, says, tmp_path):
    (tmp_path / "mine.py").write_text("def rope(x, positions, frequencies):\n    return x\n", "utf-8")
    (tmp_path / "broken.py").write_text("\n1 / 0\n", "utf-8")
    (tmp_path / "unparsed.py").write_text("def rope(x:\n", "utf-8")
    status, said = learn(*arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert says in said
