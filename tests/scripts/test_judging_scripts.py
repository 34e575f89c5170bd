"""The script that judges: parity must be able to fail."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import tinyllama
from tests.parity.test_divergence import permuted
from tests.scripts.test_scripts import load_script
from tests.shapes import tiny_model
from tests.text.tiny_tokenizers import sentencepiece_folder
from tinyllama.checkpoints import hub
from tinyllama.cli import terminal
from tinyllama.parity import notebook, subjects, suite
from tinyllama.parity.reference import reference_model

TEXT = "the cat sat on the mat, a dog ate the hat"
KERNELS = """
from dataclasses import replace
import torch
from tinyllama.attention import eager

def louder(q, k, v, context):
    return eager(q, k, 1.01 * v, context)

def leaking(q, k, v, context):
    seen = context.mask
    mask = seen.key_positions[:, None, None, :] <= seen.query_positions[:, None, :, None] + 1
    return eager(q, k, v, replace(context, visible=replace(seen, allowed=mask, causal=False)))

def nan(q, k, v, context):
    return eager(q, k, v * torch.nan, context)

def textbook(q, k, v, context):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * context.scale
    scores = scores.masked_fill(~context.mask.allowed, -torch.inf)
    return torch.einsum("bhts,bhsd->bhtd", scores.softmax(dim=-1), v)

def window(q, k, v, context):
    seen = context.mask
    return eager(q, k, v, context.where(seen.key_positions > seen.query_positions[:, None, :, None] - 8))
"""
EXPLICIT_WINDOW = """
import torch

def window(q, k, v, context):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    band = torch.ones(q.shape[2], k.shape[2]).tril().triu(-7).bool()
    scores = (q @ k.transpose(2, 3) * context.scale).masked_fill(~band, -torch.inf)
    return scores.softmax(dim=-1) @ v
"""


def save(model, folder):
    """A checkpoint folder as transformers writes it, with a small tokenizer."""
    reference_model(model, "eager").save_pretrained(folder)
    return sentencepiece_folder(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the unit-gain fixture."""
    return save(tiny_model(), tmp_path_factory.mktemp("parity") / "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two files of kernels, and a text."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in (("my.py", KERNELS), ("other.py", EXPLICIT_WINDOW), ("text.txt", TEXT)):
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def parity(monkeypatch, capfd, files):
    """Runs the script among those files, on a wide terminal; returns exit status, stdout and stderr."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            terminal.run(load_script("parity").main)
        out, err = capfd.readouterr()
        return exit.value.code, out, err

    return run


def briefly(*options):
    """The least that a run can do: one text, one dtype, one kernel where none is named."""
    attention = () if "--attention" in options else ("--attention", "eager")
    return ("--quick", "--dtype", "float32", "--text", "text.txt", *attention, *options)


def figures_of(out):
    """The JSON on stdout; NaN and Infinity, which Python would read, are none."""
    return json.loads(out, parse_constant=pytest.fail)


def assert_refused(result, expected):
    """Exit status 2, and one line."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert err.endswith(f"{lines[0]}\n")
    assert expected in lines[0]


# --- what is printed -------------------------------------------------------------------------------------


def test_a_right_model_passes_and_the_verdict_is_the_last_line(parity, tiny):
    status, out, err = parity(tiny, "--quick", "--dtype", "float32")
    assert (status, err) == (0, "tiny float32\n")
    assert "tiny float32, 252 positions (english 64, code 64, chinese 64, scripts 60)" in out
    for kernel in ("eager", "sdpa"):
        assert f"transformers {kernel}" in out
        assert f"tinyllama {kernel}" in out
    assert "greedy, batch of 4" in out
    assert "sampled, alone" in out
    assert "FAILED" not in out
    assert out.endswith("\nparity: passed\n")


def test_without_a_model_the_planted_bugs_are_tried_too(parity, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "resolve", lambda name: asked.append(name) or tiny)
    status, out, _ = parity("--quick", "--dtype", "float64")
    assert (status, asked) == (0, [hub.EMBEDDED_MODEL])
    assert "16 of 16" in out
    assert "unit-gain fixture" in out


def test_json_has_the_dtypes_from_the_widest_to_the_narrowest(parity, tiny):
    dtypes = ("--dtype", "float16", "--dtype", "float64", "--dtype", "bfloat16")
    status, out, err = parity(tiny, *briefly("--json", *dtypes))
    figures = figures_of(out)
    assert (status, figures["passed"], figures["failures"]) == (0, True, [])
    order = ["float64", "float32", "bfloat16", "float16"]
    assert [case["dtype"] for case in figures["cases"]] == order
    assert err.splitlines() == [f"tiny {dtype}" for dtype in order]
    assert figures["machine"]["torch"] == torch.__version__


def test_a_page_is_written_beside_what_is_printed(parity, tiny, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = parity(tiny, *briefly("--html", page))
    assert status == 0
    assert out.endswith("parity: passed\n")
    assert err.endswith(f"wrote {page}\n")
    assert "tinyllama eager" in page.read_text(encoding="utf-8")


def test_a_page_without_a_folder_is_refused_before_any_model_is_looked_for(parity, tmp_path):
    assert_refused(
        parity("no-such-model", "--html", tmp_path / "absent" / "page.html"), "make the folder first"
    )


def test_nan_is_a_failure_that_tables_json_and_page_can_show(parity, tiny, tmp_path):
    options = briefly("--attention", "my.py:nan", "--html", tmp_path / "page.html")
    status, out, _ = parity(tiny, *options, "--json")
    figures = figures_of(out)
    assert (status, figures["passed"]) == (1, False)
    assert figures["cases"][0]["rows"][-1]["relative"] is None
    assert "tiny float32: tinyllama my.py:nan: a logit is not finite" in figures["failures"]
    status, out, _ = parity(tiny, *options)
    assert status == 1
    assert "first divergence at layers.0.self_attn.z" in out


# --- models and texts ------------------------------------------------------------------------------------


def test_what_is_at_hand_is_judged_and_quick_takes_the_embedded_model_alone(monkeypatch, tmp_path):
    script = load_script("parity")
    monkeypatch.setattr(hub, "on_disk", lambda repo_id: None)
    assert script.default_models(quick=False) == ["smollm2", "tinyllama-shape"]
    monkeypatch.setattr(hub, "on_disk", lambda repo_id: tmp_path if repo_id == hub.DEFAULT_MODEL else None)
    assert script.default_models(quick=False) == ["smollm2", hub.DEFAULT_MODEL, "tinyllama-shape"]
    assert script.default_models(quick=True) == ["smollm2"]


@pytest.mark.parametrize(
    ("quick", "parameters", "expected"),
    [(True, 10**9, subjects.QUICK), (False, 10**9, subjects.LARGE), (False, 10**8, subjects.FULL)],
)
def test_of_a_large_model_less_is_compared(quick, parameters, expected):
    args = SimpleNamespace(quick=quick, dtype=None)
    assert load_script("parity").extent(args, SimpleNamespace(parameters=parameters)) == expected


def test_the_official_model_is_known_by_its_folder_and_has_the_notebook_s_texts(parity, tiny, monkeypatch):
    # However the folder is spelled.
    monkeypatch.chdir(tiny.parent)
    options = ("tiny", "--quick", "--dtype", "float32")
    monkeypatch.setattr(suite, "notebook_failures", lambda model, tokenizer: ["notebook, greedy: differs"])
    assert parity(*options)[0] == 0
    monkeypatch.setattr(hub, "on_disk", lambda repo_id: tiny)
    status, out, _ = parity(*options)
    assert status == 1
    assert out.endswith("tiny float32: notebook, greedy: differs\nparity: FAILED\n")


def test_a_text_of_one_s_own_is_what_is_compared(parity, tiny):
    ids = tinyllama.Tokenizer.from_folder(tiny).encode(TEXT)
    (case,) = figures_of(parity(tiny, *briefly("--json"))[1])["cases"]
    assert case["texts"] == {"text.txt": len(ids)}
    assert case["positions"] == len(ids)


def test_a_text_from_stdin_serves_both_models(parity, tiny, monkeypatch):
    stdin = SimpleNamespace(buffer=SimpleNamespace(read=iter([TEXT.encode(), b""]).__next__))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, _ = parity(tiny, "--against", tiny, *briefly("--text", "-", "--json"))
    texts = figures_of(out)["cases"][0]["texts"]
    assert (status, texts["-"]) == (0, texts["text.txt"])


def test_what_is_no_text_and_no_model_is_refused(parity, tiny, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert_refused(parity(tiny, "--text", tmp_path / "latin.txt"), "byte 3 (0xe9) is not UTF-8")
    assert_refused(parity(tiny, "--text", tmp_path / "absent.txt"), "absent.txt: cannot be read")
    assert_refused(parity("no-such-model"), "model 'no-such-model': no such folder")


def test_a_text_too_short_for_a_loss_is_refused(parity, tiny, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert_refused(parity(tiny, *briefly("--text", tmp_path / "empty.txt")), "tokens")


@pytest.mark.parametrize("options", [("--device", "nonsense"), ("--text", __file__)])
def test_the_random_shape_refuses_what_it_cannot_use(parity, options):
    assert_refused(
        parity("tinyllama-shape", *options), "nonsense" if "nonsense" in options else "no tokenizer"
    )


# --- kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "address", "suspect"),
    [("louder", "z", "none that is known"), ("leaking", "scores", "mask leaks one token")],
)
def test_a_wrong_kernel_fails_and_the_operation_is_named(parity, tiny, kernel, address, suspect):
    status, out, _ = parity(tiny, *briefly("--attention", f"my.py:{kernel}"))
    assert status == 1
    assert f"first divergence at layers.0.self_attn.{address}, " in out
    assert f"suspect: {suspect}\n" in out
    assert f"\ntiny float32: tinyllama my.py:{kernel}: relRMS " in out
    assert out.endswith("\nparity: FAILED\n")


def test_a_right_kernel_passes_and_diverges_nowhere(parity, tiny):
    status, out, _ = parity(
        tiny, *briefly("--attention", "my.py:textbook", "--attention", "sdpa", "--bisect")
    )
    assert status == 0
    for kernel in ("my.py:textbook", "sdpa"):
        assert f"tinyllama {kernel}, on all texts: no divergence" in out
    assert out.endswith("parity: passed\n")


def test_what_is_no_kernel_is_refused_before_any_model_is_looked_for(parity, tmp_path):
    (tmp_path / "raises.py").write_text("raise ValueError('two\\nlines')")
    assert_refused(parity("no-such-model", "--attention", tmp_path / "raises.py:f"), r"two\nlines; mend")
    assert_refused(parity("no-such-model", "--attention", "absent.py:f"), "absent.py: no such file")
    assert_refused(parity("no-such-model", "--attention", "my.py:absent"), "expected a function 'absent'")
    assert_refused(parity("no-such-model", "--attention", "flash"), "expected eager, sdpa, window")


def test_two_kernels_of_one_kind_pass_against_each_other(parity, tiny):
    # Neither is transformers' attention: only the other kernel can be the truth.
    status, out, _ = parity(tiny, *briefly("--attention", "my.py:window", "--against", "other.py:window"))
    assert (status, out.splitlines()[-1]) == (0, "parity: passed")
    assert "reference: other.py:window" in out


@pytest.mark.parametrize(
    ("kernel", "other", "suspect"),
    [
        ("my.py:window", "eager", "a token sees at most itself and the 7 before it"),
        ("eager", "my.py:window", "none that is known"),  # and not "no divergence", as from the oracle
    ],
)
def test_two_kernels_of_different_kinds_part_where_the_mask_is(parity, tiny, kernel, other, suspect):
    status, out, _ = parity(tiny, *briefly("--attention", kernel, "--against", other))
    assert status == 1
    assert "first divergence at layers.0.self_attn.scores" in out
    assert f"suspect: {suspect}\n" in out


# --- checkpoints -----------------------------------------------------------------------------------------


def test_a_copied_checkpoint_passes_against_the_original_on_the_original_s_ids(parity, tiny, tmp_path):
    copy = sentencepiece_folder(shutil.copytree(tiny, tmp_path / "copy"), add_bos_token=False)
    count = len(tinyllama.Tokenizer.from_folder(tiny).encode(TEXT))
    status, out, _ = parity(copy, "--against", tiny, *briefly())
    assert (status, out.splitlines()[-1]) == (0, "parity: passed")
    assert f"copy against tiny float32, {count} positions" in out
    assert "transformers sdpa (tiny)" in out


def test_rows_in_meta_s_order_fail_against_the_original_and_are_named(parity, tiny, tmp_path):
    model = tiny_model()
    projection = model.layers[2].self_attn.k_proj
    with torch.no_grad():
        projection.weight.copy_(permuted(projection.weight))
    status, out, _ = parity(save(model, tmp_path / "meta"), "--against", tiny, *briefly())
    assert status == 1
    assert "first divergence at layers.2.self_attn.k_proj" in out
    assert "pair order of Meta's" in out
    assert "\nmeta against tiny float32: tinyllama eager: relRMS " in out


def test_a_checkpoint_with_another_vocabulary_is_refused(parity, tiny, tmp_path):
    other = save(tiny_model(vocab_size=330), tmp_path / "other")
    expected = "other: expected tiny's vocabulary of 320 ids, got 330"
    assert_refused(parity(other, "--against", tiny, *briefly()), expected)


def test_a_checkpoint_of_another_width_fails_with_its_shape(parity, tiny, tmp_path):
    status, out, _ = parity(
        save(tiny_model(hidden_size=128), tmp_path / "wide"), "--against", tiny, *briefly()
    )
    assert status == 1
    assert "first divergence at embed_tokens" in out


# --- the notebook ----------------------------------------------------------------------------------------

CASES = notebook.notebook_cases()


class Decoder:
    """A tokenizer that knows the notebook's texts; ids after an id 0 are not seen."""

    def decode(self, ids, skip_special):
        assert skip_special
        seen = tuple(ids[: ids.index(0)] if 0 in ids else ids)
        known = {tuple(case.get("ids", [*case["prompt_ids"], 7])): case["text"] for case in CASES}
        return known.get(seen, "another text")


@pytest.mark.parametrize(
    ("more", "failing"),
    [([], []), ([5], ["greedy", "greedy chat", "sampled chat"]), ([0], ["greedy chat", "sampled chat"])],
    ids=["the notebook's own", "other texts", "other ids with the same texts"],
)
def test_each_text_of_the_notebook_that_comes_out_otherwise_has_its_line(monkeypatch, more, failing):
    left = iter(CASES)

    def generate(model, prompts, **settings):
        case = next(left)
        assert (prompts, settings) == ([case["prompt_ids"]], case["settings"])
        return [[*case.get("ids", [7]), *more]]

    monkeypatch.setattr(notebook, "generate", generate)
    lines = notebook.notebook_failures(None, Decoder())
    assert [line.partition(":")[0] for line in lines] == [f"notebook, {name}" for name in failing]
    assert next(left, None) is None
