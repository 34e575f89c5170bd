"""evaluate.py from the command line, on a tiny checkpoint and without a network."""

import json
import re
import socket
import subprocess
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from tests.scripts.test_judging_scripts import assert_refused, save
from tests.scripts.test_scripts import SCRIPTS, load_script
from tests.shapes import tiny_model
from tinyllama.cli import terminal
from tinyllama.evaluation import tasks
from tinyllama.evaluation.tasks import toys

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = """
from torch.nn import functional as F
from tinyllama.lab import breaks

def leak(q, k, v, context):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

meant = breaks("causal", "cache", "chunks", "padding")(leak)

def damaged(q, k, v, context):
    return q * float("nan")

damaged = breaks("causal", "cache", "chunks", "batch", "padding")(damaged)

def huge(q, k, v, context):
    return q * 1e4
"""
ON_THE_HUB = "task: far_away\ndataset_path: nobody/nothing\noutput_type: loglikelihood\n"
QUICK = ("--tasks", "toy_choice", "--limit", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the unit-gain fixture."""
    return save(tiny_model(vocab_size=300), tmp_path_factory.mktemp("evaluate") / "tiny")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, tiny):
    """Runs the script in an empty folder, without a network; returns exit status, stdout and stderr."""

    def refused(*_where):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--model", str(tiny)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            terminal.run(load_script("evaluate").main)
        return exit.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def small_index(monkeypatch, tmp_path_factory):
    """The harness's tasks are one, and its documents are on the Hub: reading the real index takes 15 s."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "far_away.yaml").write_text(ON_THE_HUB)
    monkeypatch.setattr(
        tasks,
        "TaskManager",
        lambda include_defaults: TaskManager(include_path=folder, include_defaults=False),
    )


def test_the_toys_are_scored_twice_without_a_network_and_nothing_is_left(run, tmp_path):
    names = ",".join(toys())
    status, out, err = run(
        "--tasks",
        names,
        "--limit",
        "3",
        "--attention",
        "window:size=4",
        "--layers",
        "1-2",
        "--batch",
        "4",
        "--json",
    )
    assert status == 0
    found = json.loads(out)["scores"]
    assert {score["task"] for score in found} == set(toys())
    assert all(score["documents"] == 3 == len(score["pairs"]) for score in found)
    assert any(score["difference"] for score in found)
    assert "changed:" in err
    assert not list(tmp_path.iterdir())
    status, out, _ = run("--tasks", names, "--limit", "3", "--batch", "4", "--json")
    assert status == 0
    alone = json.loads(out)["scores"]
    assert [score["unchanged"] for score in alone] == [score["unchanged"] for score in found]
    assert all(score["changed"] is None for score in alone)


def test_a_table_has_a_row_for_each_metric_with_its_interval(run):
    status, out, _ = run("--tasks", "toy_choice", "--limit", "3", "--attention", "eager", "--layers", "0,2-3")
    assert status == 0
    title, head, acc, acc_norm = (line.rstrip() for line in out.splitlines())
    assert title == "attention: sdpa; changed: eager, layers 0,2-3"
    assert head.split() == ["task", "metric", "N", "unchanged", "changed", "change", "95%"]
    assert acc.split()[1:3] == ["acc", "3"]
    assert acc.endswith("+0.000 -0.392 to +0.392")
    assert acc_norm.startswith("toy_choice acc_norm")


def test_examples_and_chats_change_what_is_asked(run, tiny):
    (tiny / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")

    def values(*options):
        status, out, _ = run("--tasks", "toy_cloze,toy_perplexity", "--limit", "2", "--json", *options)
        assert status == 0
        return [score["unchanged"] for score in json.loads(out)["scores"]]

    plain = values()
    assert values("--chat")[0] != plain[0]
    assert values("--chat")[2:] == plain[2:]  # a text alone is no chat


def test_the_toys_are_listed(run):
    status, out, err = run("--list")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:-1]] == list(toys())
    assert all("TOY" in line for line in out.splitlines()[:-1])


def test_a_kernel_that_sees_later_tokens_is_shown_or_measured_as_declared(run, tmp_path):
    (tmp_path / "my.py").write_text(KERNELS)
    status, out, _ = run(*QUICK, "--attention", "my.py:leak")
    assert status == 1
    assert "BROKEN   causal" in out
    status, out, err = run(*QUICK, "--attention", "my.py:meant")
    assert status == 0
    assert "warning: my.py:meant sees later tokens, as declared" in err


def test_a_kernel_that_gives_nan_has_no_scores(run, tmp_path):
    (tmp_path / "my.py").write_text(KERNELS)
    status, out, err = run(*QUICK, "--attention", "my.py:damaged")
    assert (status, out) == (1, "")
    assert err.endswith("error: the model gave NaN or infinite logits; try float32, or check the weights\n")


def test_huge_numbers_are_shown_whole_on_a_narrow_terminal(run, tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text(KERNELS)
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run("--tasks", "toy_perplexity", "--attention", "my.py:huge", "--threads", "1")
    assert status == 0
    row = next(line for line in out.splitlines() if "word_perplexity" in line)
    assert re.search(r"\+\d\.\de\+\d+ \+\d\.\de\+\d+ to \+\d\.\de\+\d+$", row.rstrip())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "no task: give --tasks"),
        (("--tasks", " ,"), "no task: give --tasks"),
        ((*QUICK, "--layers", "1"), "need another attention"),
        ((*QUICK, "--attention", "windows"), "did you mean 'window'?"),
        (("--tasks", "toy_choise"), "did you mean 'toy_choice'?"),
        (("--tasks", "toy_choice,nothing_at_all"), "task 'nothing_at_all': not one of"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, small_index, arguments, expected):
    status, out, err = run(*arguments)
    assert_refused((status, out, err.removeprefix(reading())), expected)


def test_a_layer_that_there_is_not_is_refused_before_anything_is_measured(run):
    assert_refused(run(*QUICK, "--attention", "window", "--layers", "9"), "layers: expected 0 to 3, got 9")


def test_without_the_hub_the_line_names_the_toys(run, small_index):
    start = time.perf_counter()
    status, out, err = run("--tasks", "toy_choice,far_away")
    assert time.perf_counter() - start < 20
    assert_refused(
        (status, out, err.removeprefix(reading())), "far_away: documents not on this disk, and the Hub"
    )
    assert ", ".join(toys()) in err


def reading():
    return "reading the harness's index of tasks, some 15 seconds\n"


def test_without_the_harness_the_line_names_the_extra(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "tinyllama.evaluation."))]:
        monkeypatch.delitem(sys.modules, name)
    finder = PathFinder.find_spec
    monkeypatch.setattr(
        PathFinder, "find_spec", lambda name, *more: None if name == "lm_eval" else finder(name, *more)
    )
    assert_refused(run(*QUICK), 'lm_eval is not installed: pip install "tinyllama[evaluate]"')


def test_the_script_does_not_hide_the_package_of_its_name():
    """`import evaluate`, as some of the harness's metrics do, must not find scripts/evaluate.py."""
    code = (
        "import runpy, sys\n"
        f"sys.path[0], sys.argv = {str(SCRIPTS)!r}, ['evaluate.py', '--list']\n"
        "try: runpy.run_path(sys.path[0] + '/evaluate.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import importlib.util; print(importlib.util.find_spec('evaluate').origin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.splitlines()[-1]).parent != SCRIPTS
