"""Training from scratch: transformers' gradients and AdamW's step to the bit; resuming; what is learnt."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import tinyllama
from tests.pages import Read, nothing_but_the_one_style_is_allowed
from tests.scripts.test_scripts import load_script
from tinyllama.attention import eager, sdpa
from tinyllama.checkpoints.load import load_model
from tinyllama.cli import terminal
from tinyllama.config import LlamaConfig
from tinyllama.lab.kernel_file import load_kernel
from tinyllama.lab.training.experiment import Experiment
from tinyllama.lab.training.findings import findings
from tinyllama.lab.training.from_scratch import Recipe, Run, shape, train, untrained
from tinyllama.lab.training.page import loss_chart, page
from tinyllama.lab.training.steps import CLIP, Schedule, saved_bytes, step, windows
from tinyllama.parity.reference import reference_model

SMALL = LlamaConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)
SHORT = Recipe(steps=8, batch=4, length=16, warm_up=2, looks=4)
pytestmark = pytest.mark.usefixtures("one_thread")


def two_back(length, seed=0):
    """A text whose next token is mostly the one before the last: the last alone says nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, (length,), generator=generator)
    repeats = torch.rand(length, generator=generator) < 0.9
    for place in range(2, length):
        if repeats[place]:
            ids[place] = ids[place - 2]
    return ids


def last(runs):
    return list(runs)[-1]


def blind(q, k, v, context):
    return torch.zeros_like(q)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_that_of_transformers_and_adamw_to_the_bit(accumulate):
    ours = untrained(SMALL, 0)
    ours.set_attention(eager)
    theirs = reference_model(copy.deepcopy(ours), "eager").train()
    rows = windows(two_back(200), 4, 16, 0, 0)
    weights = dict(ours.named_parameters())
    twins = {name: theirs.get_parameter(f"model.{name}") for name in weights}
    optimizers = [torch.optim.AdamW(some.values(), lr=1e-3) for some in (weights, twins)]
    loss = step(ours, optimizers[0], rows, accumulate=accumulate)
    expected = 0.0
    for part in rows.chunk(accumulate):
        logits = theirs(part[:, :-1]).logits.flatten(0, 1)
        share = F.cross_entropy(logits, part[:, 1:].flatten()) * (len(part) / len(rows))
        share.backward()
        expected += share.item()
    torch.nn.utils.clip_grad_norm_(twins.values(), CLIP)
    optimizers[1].step()
    assert loss == expected
    for name, weight in weights.items():
        assert torch.equal(weight.grad, twins[name].grad), name
        assert torch.equal(weight, twins[name]), name


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    text = two_back(400)
    whole, parts = untrained(SMALL, 1), untrained(SMALL, 1)
    expected = last(train(whole, "sdpa", sdpa, text, text.tolist()[:50], SHORT, 1))
    for run in train(parts, "sdpa", sdpa, text, text.tolist()[:50], SHORT, 1, tmp_path):
        if len(run.losses) == 5:  # one after the second look: that one is done again
            break
    again = untrained(SMALL, 1)
    runs = list(train(again, "sdpa", sdpa, text, text.tolist()[:50], SHORT, 1, tmp_path))
    assert len(runs[0].losses) == 4
    assert (runs[-1].losses, runs[-1].held_out) == (expected.losses, expected.held_out)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
    assert [len(run.losses) for run in train(again, "sdpa", sdpa, text, [1, 2], SHORT, 1, tmp_path)] == [8]
    other = Recipe(**{**vars(SHORT), "lr": 1e-3})
    with pytest.raises(tinyllama.InputError, match="was trained in another way"):
        last(train(again, "sdpa", sdpa, text, [1, 2], other, 1, tmp_path))


def test_a_kill_between_the_checkpoint_and_the_state_changes_nothing(tmp_path):
    text = two_back(400)

    def last_of(folder):
        return last(train(untrained(SMALL, 1), "sdpa", sdpa, text, [1, 2, 3], SHORT, 1, folder))

    expected = last_of(None)
    for run in train(untrained(SMALL, 1), "sdpa", sdpa, text, [1, 2, 3], SHORT, 1, tmp_path):
        if len(run.losses) == 4:
            break
    # The checkpoint of a later look is there, its state is not.
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    assert last_of(tmp_path).losses == expected.losses


def test_another_experiment_or_a_damaged_state_is_one_line(tmp_path):
    text = two_back(400)
    arguments = ("sdpa", sdpa, text, [1, 2, 3], SHORT, 0, tmp_path)
    last(train(untrained(SMALL, 0), *arguments))
    wider = replace(SMALL, hidden_size=64)
    with pytest.raises(tinyllama.InputError, match="was trained in another way"):
        last(train(untrained(wider, 0), *arguments))
    for damaged in (b"", b"x" * 100):
        (tmp_path / "resume.safetensors").write_bytes(damaged)
        with pytest.raises(tinyllama.InputError, match=r"is not a state that train\.py wrote"):
            last(train(untrained(SMALL, 0), *arguments))
    for few, held_out in ((text[:16], [1, 2]), (text, [1])):
        with pytest.raises(tinyllama.InputError, match="give a longer text"):
            last(train(untrained(SMALL, 0), "sdpa", sdpa, few, held_out, SHORT, 0))


def test_attention_learns_what_is_to_be_learnt_and_a_blind_kernel_the_frequencies_alone():
    text, held_out = two_back(20_000), two_back(1_000, seed=1)
    config = replace(SMALL, num_key_value_heads=2)
    recipe = Recipe(steps=400, batch=16, length=32, lr=1e-2, looks=1)
    ends = {
        name: last(train(untrained(config, 0), name, kernel, text, held_out.tolist(), recipe, 0)).held_out[
            -1
        ][1]
        for name, kernel in (("sdpa", sdpa), ("blind", blind))
    }
    # What is left if the rule is known: of a window's first prediction nothing is.
    known = torch.where(held_out[2:] == held_out[:-2], 0.9 + 0.1 / 8, 0.1 / 8).log().neg()
    blank = torch.arange(1, 999) % 32 == 0
    least = torch.where(blank, math.log(8), known).mean().item()
    assert ends["sdpa"] < 1.2 * least
    assert ends["blind"] > 0.95 * math.log(8)


def test_what_was_trained_is_an_ordinary_checkpoint_and_asks_for_its_kernel(tmp_path):
    text = two_back(400)
    for name in ("sdpa", "window:size=4"):
        folder = tmp_path / name
        folder.mkdir()
        model = untrained(SMALL, 0)
        last(train(model, name, load_kernel(name), text, [1, 2, 3], SHORT, 0, folder))
        loaded = load_model(folder, device="cpu", dtype="float32", attention=name)
        assert torch.equal(loaded(text[None, :9]), model(text[None, :9]))
    with pytest.raises(
        tinyllama.InputError, match=r"trained with attention 'window\(size=4\)', and attention is sdpa"
    ):
        load_model(folder, device="cpu", dtype="float32")


def test_the_learning_rate_rises_in_a_line_and_falls_by_a_cosine():
    schedule = Schedule(1.0, steps=100, warm_up=10)
    assert [schedule.at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert schedule.at(55) == pytest.approx(0.55)
    assert schedule.at(100) == pytest.approx(0.1)


def some_runs(kernel, losses):
    return [Run(kernel, seed, (loss,), ((1, loss),), 1000) for seed, loss in enumerate(losses)]


def test_a_difference_is_paired_by_seed():
    runs = {"a": some_runs("a", [2.0, 4.0, 3.0]), "b": some_runs("b", [2.2, 4.4, 3.3])}
    found = findings(runs, {"a": 100.0, "b": 150.0})
    assert str(found[1]) == "b learns 10.0% ± 0.0% worse at equal tokens, 50% faster"
    runs["b"] = some_runs("b", [3.0, 3.0, 3.0])
    noisy = str(findings(runs, {"a": 100.0, "b": 80.0})[1])
    assert "learns as well, as far as these seeds tell" in noisy
    assert noisy.endswith("20% slower")
    assert str(findings(runs, {"a": 100.0, "b": 100.3})[1]).endswith(", as fast")
    once = {"a": some_runs("a", [2.0]), "b": some_runs("b", [2.0002])}
    assert str(findings(once, {"a": 1.0, "b": 1.0})[1]) == "b learns as well, as fast"


@pytest.mark.parametrize("size", [300_000, 3_000_000, 30_000_000])
def test_a_size_is_the_smallest_model_that_has_it(size):
    config = shape(size, 1024, 128)
    assert size <= sum(config.parameters.values()) < 2.2 * size
    assert config.hidden_size % config.num_attention_heads == 0


def test_the_script_trains_compares_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    text = tmp_path / "corpus"
    text.mkdir()
    (text / "a.md").write_text("the cat sat on the mat. a dog ate the hat. " * 60, "utf-8")
    arguments = [
        "sdpa",
        "window:size=2",
        "--text",
        str(text),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "200k",
    ]
    arguments += ["--steps", "8", "--seeds", "2", "--batch", "2", "--length", "16", "--vocab", "280"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            terminal.run(load_script("train").main)
        return ended.value.code, capsys.readouterr().out

    status, said = run()
    assert status == 0
    assert said.splitlines()[-2] == "Beside sdpa:"
    assert said.splitlines()[-1].startswith("  window:size=2 learns")
    status, said = run("--json")
    found = json.loads(said)
    assert [len(one["losses"]) for one in found["runs"]] == [8] * 4
    assert found["runs"][0]["losses"] != found["runs"][1]["losses"]
    assert found["findings"][1]["kernel"] == "window:size=2"
    _, tokenizer = tinyllama.load(str(tmp_path / "out" / "sdpa-0"), device="cpu")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(tinyllama.InputError, match="trained with attention"):
        tinyllama.load(str(tmp_path / "out" / "window-size-2-1"), device="cpu")
    status, said = run("--html", str(tmp_path / "page.html"), "--beside-transformers")
    assert status == 0
    assert "transformers: " in said
    source = (tmp_path / "page.html").read_text("utf-8")
    assert "2 attentions, trained alike on 256 tokens" in source
    assert "transformers trains the same model at" in source
    (text / "b.md").write_text("more", "utf-8")
    assert run() == (2, "")


LEAK = """
from torch.nn import functional as F
def leak(q, k, v, context):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
"""


@pytest.fixture
def train_script(tmp_path, monkeypatch, capsys):
    """Runs train.py on a short text; returns exit status, stdout and stderr."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. a dog ate the hat. " * 40, "utf-8")
    (tmp_path / "mine.py").write_text(LEAK, "utf-8")
    monkeypatch.chdir(tmp_path)
    brief = "--text text.txt --out out --steps 4 --seeds 1 --batch 2 --length 16 --size 100k"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *brief.split()])
        with pytest.raises(SystemExit) as ended:
            terminal.run(load_script("train").main)
        return ended.value.code, *capsys.readouterr()

    return run


def test_a_kernel_that_sees_the_future_is_not_trained(train_script, tmp_path):
    # It would learn best of all.
    status, out, err = train_script("sdpa", "mine.py:leak", "--vocab", "280")
    assert (status, out) == (2, "")
    assert "mine.py:leak: causal: T=2: token 0 changes when token 1 does" in err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*/model.safetensors"))


def test_another_model_s_tokenizer_and_shape(train_script, tmp_path, smollm2_folder):
    config = json.loads((smollm2_folder / "config.json").read_text("utf-8"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 5}  # another vocabulary's
    (tmp_path / "config.json").write_text(json.dumps(config | small | heads), "utf-8")
    status, out, err = train_script(
        "sdpa", "--tokenizer", str(smollm2_folder), "--config", "config.json", "--json"
    )
    assert status == 0, err
    shape = json.loads(out)["model"]
    assert (shape["layers"], shape["hidden_size"], shape["vocabulary"]) == (1, 32, config["vocab_size"])
    model, tokenizer = tinyllama.load(str(tmp_path / "out" / "sdpa-0"), device="cpu")
    theirs = tinyllama.Tokenizer.from_folder(smollm2_folder)
    assert tokenizer.encode("the cat's hat") == theirs.encode("the cat's hat")
    assert model.config.eos_ids == {theirs.eos_id}
    # The folder has another tokenizer now.
    assert "another --text, --vocab or --tokenizer" in train_script("sdpa", "--vocab", "280")[2]
    (tmp_path / "config.json").write_text(
        json.dumps(config | small | {"max_position_embeddings": 8}), "utf-8"
    )
    _, _, err = train_script("sdpa", "--tokenizer", str(smollm2_folder), "--config", "config.json")
    assert "--length: expected 8 or fewer" in err.splitlines()[-1]


def test_the_memory_of_a_step_is_what_autograd_keeps():
    model, rows = untrained(SMALL, 0), two_back(68).view(4, 17)
    model.set_attention("sdpa")
    whole, half = saved_bytes(model, rows), saved_bytes(model, rows[:2])
    assert 1.9 < whole / half < 2.1
    model.set_attention("eager")  # which keeps (B, H, T, T) patterns in each of its layers
    assert saved_bytes(model, rows) - whole > 4 * 2 * 16 * 16 * 4 * SMALL.num_hidden_layers / 2
    assert whole < 2 * sum(4 * 16 * 4 * width for width in (8 * 3, 32 * 12 * 2, 64 * 5 * 2))


def test_a_kernel_whose_code_has_changed_since_is_told(tmp_path, capsys):
    file, folder = tmp_path / "mine.py", tmp_path / "out"
    folder.mkdir()
    code = "import tinyllama\ndef mine(q, k, v, context): return tinyllama.sdpa(q, k, v, context)\n"
    file.write_text(code, "utf-8")
    last(
        train(
            untrained(SMALL, 0), "mine", load_kernel(f"{file}:mine"), two_back(99), [1, 2], SHORT, 0, folder
        )
    )
    load_model(folder, device="cpu", dtype="float32", attention=f"{file}:mine")
    assert capsys.readouterr().err == ""
    file.write_text(code.replace("sdpa(q,", "sdpa(2 * q,"), "utf-8")
    load_model(folder, device="cpu", dtype="float32", attention=f"{file}:mine")
    assert "the code of mine is not what it was" in capsys.readouterr().err


def an_experiment(*, seeds=3, kernels=("sdpa", "window:size=64", "<b>alibi</b>")):
    runs = {
        name: [
            Run(name, seed, (3.0, 2.5), ((1, 3.0 + n / 10), (2, 2.5 + n / 20 + seed / 50)), 10**6 * (n + 1))
            for seed in range(seeds)
        ]
        for n, name in enumerate(kernels)
    }
    speed = {name: 1000.0 + n for n, name in enumerate(kernels)}
    shape = {"layers": 2, "parameters": 123456}
    recipe = replace(SHORT, steps=2, batch=8, length=128)
    whole = [run for own in runs.values() for run in own]
    return Experiment({"cpu": "one"}, recipe, shape, 999, findings(runs, speed), whole)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_says_what_was_found(seeds):
    experiment = an_experiment(seeds=seeds)
    source = page(experiment)
    text = " ".join(Read(source).text.split())
    assert "3 attentions, trained alike on 2,048 tokens" in text
    assert f"window:size=64 learns {'2.0% ± 0.0%' if seeds == 3 else '2.0%'} worse at equal tokens" in text
    assert "<b>alibi</b>" not in source
    assert source.count("<polyline") == 3
    assert source.count("<polygon") == (3 if seeds == 3 else 0)
    nothing_but_the_one_style_is_allowed(source)
    alone = an_experiment(seeds=seeds, kernels=("sdpa",))
    assert "sdpa: loss 2.5" in " ".join(Read(page(alone)).text.split())
    assert repr(alone).count("Beside") == 0


def test_a_loss_that_is_not_finite_has_no_place_on_the_chart():
    experiment = an_experiment()
    lost = replace(experiment.runs[3], held_out=((1, 3.0), (2, math.nan)))
    runs = [*experiment.runs[:3], lost, *experiment.runs[4:]]
    chart = loss_chart(replace(experiment, runs=runs))
    assert [len(curve.lines) for curve in chart.curves] == [1, 0, 1]
    assert "nan" not in page(replace(experiment, runs=runs)).split("<svg")[1].split("</svg>")[0]


def test_every_step_has_its_learning_rate_and_norms_do_not_decay(monkeypatch):
    seen = []

    def noting(model, optimizer, rows, **more):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        return step(model, optimizer, rows, **more)

    monkeypatch.setattr("tinyllama.lab.training.from_scratch.step", noting)
    last(train(untrained(SMALL, 0), "sdpa", sdpa, two_back(100), [1, 2, 3], SHORT, 0))
    schedule = Schedule(SHORT.lr, SHORT.steps, SHORT.warm_up)
    assert seen == [[(schedule.at(n), SHORT.decay), (schedule.at(n), 0.0)] for n in range(SHORT.steps)]
