"""lab.py and heal.py from the command line, on a tiny checkpoint."""

import json
import os
import signal
import sys

import pytest
import torch

from tests.scripts.test_judging_scripts import assert_refused, figures_of, save
from tests.scripts.test_scripts import load_script
from tests.shapes import tiny_model
from tinyllama.cli import terminal
from tinyllama.lab.healed import load_healed

KERNELS = """
import torch
from torch.nn import functional as F
from tinyllama.attention import sdpa

def near(q, k, v, context, *, size=4):
    seen = context.mask
    distance = seen.query_positions[:, None, :, None] - seen.key_positions[:, None, None, :]
    return sdpa(q, k, v, context.where(distance < size))

def leak(q, k, v, context):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

def flat(q, k, v, context):
    return sdpa(q, k, v.detach(), context)

def broken(q, k, v, context):
    return q.no_such_method()
"""
TEXT = "the cat sat on the mat, a dog ate the hat. " * 12
# As little as possible: a short text, no timing.
BRIEF = ("--text", "text.txt", "--tokens", "32", "--rounds", "0", "--new-tokens", "3", "--prompt", "a dog")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the unit-gain fixture."""
    return save(tiny_model(vocab_size=300), tmp_path_factory.mktemp("lab") / "tiny")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, tiny):
    """Runs a script in a folder with kernels and a text; returns exit status, stdout and stderr."""
    for name, content in (("my.py", KERNELS), ("text.txt", TEXT)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--model", str(tiny)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            terminal.run(load_script(name).main)
        out, err = capfd.readouterr()
        return exit.value.code, out, err

    return run


# --- lab -------------------------------------------------------------------------------------------------


def test_a_kernel_file_gets_a_card_and_a_page(run, tmp_path):
    timed = (*BRIEF[:5], "1", *BRIEF[6:])
    status, out, err = run("lab", "my.py:near", "--layers", "1-2", *timed, "--html", "card.html")
    assert status == 0
    assert "beside the unchanged model (sdpa), on text.txt 32 tokens" in out
    assert "my.py:near, layers 1-2" in out
    assert "contract: 12 clauses kept" in out
    row = next(line for line in out.splitlines() if line.startswith("my.py:near "))
    assert row.count("×") >= 2  # prefill and decode beside the unchanged model
    assert "text.txt, its first 16 tokens" in out
    assert err.endswith("wrote card.html\n")
    assert "my.py:near" in (tmp_path / "card.html").read_text("utf-8")


def test_several_kernels_settings_and_places_in_one_run_as_json(run):
    status, out, _ = run(
        "lab", "my.py:near:size=2", "window:size=2", "--layers", "0,3", "--heads", "1", *BRIEF, "--json"
    )
    figures = figures_of(out)
    mine, window = figures["changes"]
    assert status == 0
    assert (mine["name"], mine["layers"], mine["heads"]) == ("my.py:near:size=2", [0, 3], [1])
    assert mine["results"] == window["results"]  # two ways to write the same kernel
    assert [bool(sum(row)) for row in mine["results"]["heads_direct"]] == [True, False, False, True]
    assert figures["machine"]["command"].startswith("python scripts/lab.py my.py:near:size=2 window:size=2")


def test_a_broken_kernel_is_shown_with_its_smallest_example_and_status_1(run):
    status, out, _ = run("lab", "my.py:leak", "my.py:broken", "my.py:near", *BRIEF)
    assert status == 1
    assert "my.py:leak: breaks the contract" in out
    assert "T=2: token 0 changes when token 1 does" in out
    assert "has no attribute 'no_such_method'" in out
    assert "return q.no_such_method()" in out  # the user's own line
    assert "my.py:near, layers 0-3" in out
    assert "my.py:leak, layers" not in out


def test_variants_and_addresses_are_listed(run):
    status, out, err = run("lab", "--list")
    assert (status, err) == (0, "")
    assert "sinks:first=4,size=252 " in out
    assert all(name in out for name in ("alibi", "differential", "flex"))
    status, out, err = run("lab", "--addresses", "--tokens", "100")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.rstrip() for line in out.splitlines() if "(B, " in line}
    # 4 layers of 8 heads, 100 x 100 scores of 4 bytes: 1.28 MB.
    assert "(B, H, T, S)" in rows["layers.*.self_attn.pattern"]
    assert rows["layers.*.self_attn.pattern"].endswith("1.3")
    assert "(B, T, V)" in rows["lm_head"]


@pytest.mark.parametrize("options", [(), ("--with-weights",)])
def test_a_new_kernel_is_measured_as_it_is_and_never_replaces_a_file(run, tmp_path, options):
    status, out, err = run("lab", "--new", "mine.py", *options)
    assert (status, err) == (0, "")
    assert "python scripts/lab.py mine.py:attend" in out
    written = (tmp_path / "mine.py").read_text("utf-8")
    assert "{name}" not in written
    assert_refused(run("lab", "--new", "mine.py", *options), "mine.py: is there already")
    assert_refused(run("lab", "--new", "mine"), "mine: expected a name that ends in .py")
    assert_refused(run("lab", "window", "--with-weights"), "goes with --new FILE")
    assert (tmp_path / "mine.py").read_text("utf-8") == written
    status, out, _ = run("lab", "mine.py:attend", *BRIEF)
    assert status == 0
    assert "contract: 12 clauses kept" in out


def test_a_kernel_that_breaks_a_clause_is_measured_on_request(run):
    flat = "my.py:flat"
    status, out, _ = run("lab", flat, *BRIEF)
    assert (status, "--breaks gradient" in " ".join(out.split())) == (1, True)
    status, out, _ = run("lab", flat, "--breaks", "gradient", *BRIEF)
    assert status == 0
    assert "gradient: broken, as declared" in out
    assert_refused(run("lab", flat, "--breaks", "shape", *BRIEF), "breaks: expected some of causal")


def test_what_a_capture_costs_is_measured(run):
    refused = run("lab", "--capture", "layers.*.self_attn.pattern", *BRIEF)  # a fused kernel has none
    assert_refused(refused, "layers.0.self_attn.pattern")
    status, out, err = run("lab", "--capture", "layers.*.self_attn.z", *BRIEF)
    assert (status, err) == (0, "")
    text, step, captured = out.splitlines()
    assert text.startswith("a text of 32 tokens: ")
    assert step.startswith("one token more, from the cache: ")
    assert all("of which the taps take" in line and "with the capture" in line for line in (text, step))
    assert captured == "captured of the text: 0.0 MB"  # 4 layers, 32 tokens, 8 heads of 8 float32 numbers


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no kernel: give one, --new FILE"),
        (["windows"], "attention: expected eager, sdpa, window"),
        (["my.py:absent"], "my.py: expected a function 'absent', found"),
        (["window:width=3"], "expected settings size, got 'width'"),
        (["window", "--layers", "2-9"], "layers: expected 0 to 3, got 4"),
        (["window", "--layers", "one"], "--layers: expected numbers such as 0-3,7, got 'one'"),
        (["window", "--layers", "3-1"], "--layers: expected numbers such as 0-3,7, got '3-1'"),
        (["window", "--heads", "8"], "heads: expected 0 to 7, got 8"),
        (["window:size=0", *BRIEF], "window: size: expected 1 or more, got 0"),
        (["window", "--tokens", "1"], "--tokens: expected 4 or more, got 1"),
        (["window", "--text", "absent.txt"], "absent.txt: cannot be read"),
        (["window", "--html", "absent/card.html"], "--html absent/card.html: expected a file in a folder"),
        (["--healed", "text.txt"], "text.txt: expected a file that heal.py wrote"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, expected):
    assert_refused(run("lab", *arguments), expected)


# --- heal ------------------------------------------------------------------------------------------------

LEARN = ("my.py:near:size=1", "--layers", "1-2", "--text", "text.txt", "--length", "16", "--lr", "0.01")


def test_healing_shows_three_perplexities_and_saves_the_layers(run, tmp_path):
    status, out, err = run("heal", *LEARN, "--steps", "40", "--out", "h.safetensors")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith("held-out tokens, beside the unchanged model:")
    unchanged, changed, healed = (float(line.split()[1].rstrip(",").replace(",", "")) for line in lines[1:])
    assert [line.split()[0] for line in lines[1:]] == ["unchanged", "changed", "healed"]
    assert healed < min(unchanged, changed)  # a text of one sentence is learnt quickly
    assert lines[3].endswith("40 steps")
    assert "40 of 40: loss " in err
    assert err.endswith("wrote h.safetensors, 40 steps\n")
    assert err.startswith("warning: the text will be read 20 times")
    assert len(load_healed(tmp_path / "h.safetensors").losses) == 40


def test_healing_resumes_from_its_file_and_the_lab_measures_it(run, tmp_path):
    run("heal", *LEARN, "--steps", "2", "--out", "h.safetensors")
    status, out, _ = run("heal", *LEARN, "--steps", "4", "--out", "h.safetensors", "--json")
    assert status == 0
    assert len(json.loads(out)["losses"]) == 4
    before = (tmp_path / "h.safetensors").read_bytes()
    status, out, err = run("heal", *LEARN, "--steps", "3", "--out", "h.safetensors")  # nothing left to do
    assert status == 0
    assert "wrote" not in err
    assert out.endswith("4 steps\n")
    assert (tmp_path / "h.safetensors").read_bytes() == before

    status, out, _ = run(
        "lab", "my.py:near:size=1", "--layers", "1-2", "--healed", "h.safetensors", *BRIEF, "--json"
    )
    plain, healed = figures_of(out)["changes"]
    assert healed["name"] == "my.py:near:size=1, healed 4 steps"
    assert healed["layers"] == [1, 2]
    assert healed["results"]["all"]["after"] != plain["results"]["all"]["after"]
    assert healed["results"]["all"]["before"] == plain["results"]["all"]["before"]


def test_another_experiment_does_not_resume_from_a_file(run, tmp_path):
    run("heal", *LEARN, "--steps", "1", "--out", "h.safetensors")
    before = (tmp_path / "h.safetensors").read_bytes()
    result = run("heal", *LEARN[:-1], "0.02", "--steps", "2", "--out", "h.safetensors")
    assert_refused(result, "h.safetensors: was trained with lr 0.01, expected 0.02")
    (tmp_path / "text.txt").write_text(TEXT * 2)
    assert_refused(run("heal", *LEARN, "--steps", "2", "--out", "h.safetensors"), "was trained with text")
    assert (tmp_path / "h.safetensors").read_bytes() == before


def test_ctrl_c_ends_after_the_running_step_and_saves_it(run, tmp_path, monkeypatch):
    steps, adamw_step = [], torch.optim.AdamW.step

    def interrupted(optimizer, *arguments):
        steps.append(adamw_step(optimizer, *arguments))
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    status, out, err = run("heal", *LEARN, "--steps", "9", "--out", "h.safetensors")
    assert status == 130
    assert out.endswith("3 steps\n")
    assert "wrote h.safetensors, 3 steps" in err
    assert len(load_healed(tmp_path / "h.safetensors").losses) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["windows", "--text", "text.txt"], "attention: expected eager, sdpa, window"),
        (["window"], "the following arguments are required: --text"),
        ([*LEARN, "--steps", "1", "--length", "1000"], "expected more than 1000 tokens to learn from"),
        ([*LEARN, "--lr", "-1"], "--lr: expected a number between 0 and 1, got -1.0"),
        ([*LEARN, "--batch", "0"], "--batch: expected 1 or more, got 0"),
        ([*LEARN, "--out", "absent/h.safetensors"], "--out absent/h.safetensors: expected a file"),
        ([*LEARN, "--out", "text.txt"], "text.txt: expected a file that heal.py wrote"),
        ([*LEARN, "--layers", "7"], "layers: expected 0 to 3, got 7"),
    ],
)
def test_bad_input_to_heal_is_one_line_and_status_2(run, tmp_path, arguments, expected):
    assert_refused(run("heal", *arguments), expected)
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"my.py", "text.txt"}
