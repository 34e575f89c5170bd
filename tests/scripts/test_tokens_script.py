"""scripts/tokens.py: the same ids as the package, in a form that can be piped, and errors of one line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import tokens
from tests.text.tiny_tokenizers import sentencepiece_folder
from tinyllama.errors import InputError
from tinyllama.text.tokenizer import Tokenizer

SCRIPT = Path(tokens.__file__)
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sentencepiece_folder(tmp_path_factory.mktemp("model"), eos_token="</s>", chat_template=TEMPLATE)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Calls the script with some arguments; returns what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tokens.py", "--model", str(folder), *arguments])
        tokens.main()
        return capsys.readouterr().out

    return call


def test_lines_can_be_piped(run, folder):
    tokenizer = Tokenizer.from_folder(folder)
    lines = run("the\tcat\n</s>").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    ids = tokenizer.encode("the\tcat\n</s>")
    assert [(int(position), int(index)) for position, index, *_ in rows] == list(enumerate(ids))
    assert bytes.fromhex("".join(row[3] for row in rows)) == b"<s> the\tcat\n</s>"
    assert [row[4] for row in rows] == ["special", *["text"] * (len(ids) - 2), "special"]
    bare = " ".join(map(str, ids[1:]))
    assert lines[len(rows) :] == [f"# without BOS: differs from 0 on: {bare}"]


def test_a_chat_shows_origins_and_the_other_routes(run, folder):
    tokenizer = Tokenizer.from_folder(folder)
    found = json.loads(run("--chat", "--system", "sat", "--json", "a </s> hat"))
    messages = [{"role": "system", "content": "sat"}, {"role": "user", "content": "a </s> hat"}]
    assert found["text"] == "<|system|>sat</s><|user|>a </s> hat</s>"
    ids = [row["id"] for row in found["tokens"]]
    assert ids == tokenizer.chat(messages)
    typed = bytes.fromhex("".join(row["bytes"] for row in found["tokens"] if row["origin"] == "text"))
    assert typed == b"sata </s> hat"
    assert [row["piece"] for row in found["tokens"] if row["origin"] == "special"] == ["</s>"] * 2
    routes = {route["name"]: route for route in found["routes"]}
    assert routes["rendered, then encoded"]["ids"] == tokenizer.encode(found["text"])
    assert routes["rendered, then encoded"]["first_difference"] == 0
    without = routes["rendered, then encoded without BOS"]
    first = without["first_difference"]
    # There, the typed </s> becomes the special token.
    assert without["ids"][:first] == ids[:first]
    assert without["ids"][first] != ids[first]


def test_a_route_that_only_stops_earlier_differs_where_it_stops():
    chat = [tokens.Token(5, "text"), tokens.Token(6, "text")]
    assert tokens.route("", [5], chat).first_difference == 1
    assert tokens.route("", [5, 6], chat).first_difference is None


def test_the_table_shows_brackets_and_escapes_controls(run, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("[bold]\x1b[31m \u202e")
    assert "b" in shown
    assert "[" in shown
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown


def test_text_may_come_from_a_file_or_a_pipe(run, tmp_path, monkeypatch):
    direct = run("the cat")
    (tmp_path / "text").write_bytes(b"the cat\n")
    assert run("--file", str(tmp_path / "text")) == direct
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    assert run() == direct
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff")))
    with pytest.raises(InputError, match="stdin: byte 4"):
        run()


def test_options_that_contradict_each_other_exit_with_2(run):
    for arguments in (["a", "--file", "b"], ["a", "--system", "b"]):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2


def test_as_a_program_it_exits_with_2_and_one_line_on_bad_input(tmp_path):
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path), "text"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
