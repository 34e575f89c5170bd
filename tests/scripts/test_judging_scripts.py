"""The script that judges: it passes what is right, and fails what is wrong and names it."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import tinyllama
from tests.parity.test_divergence import as_meta
from tests.scripts.test_scripts import load_script
from tests.shapes import tiny_config, tiny_model
from tests.text.tiny_tokenizers import sentencepiece_folder
from tinyllama.checkpoints import hub
from tinyllama.cli import terminal
from tinyllama.parity import subjects, suite
from tinyllama.parity.notebook import notebook_cases, notebook_failures
from tinyllama.parity.reference import reference_model
from tinyllama.progress import progress_line

TEXT = "the cat sat on the mat, a dog ate the hat"
KERNELS = """
import torch
from tinyllama.attention import eager

def louder(q, k, v, context):
    return eager(q, k, 1.01 * v, context)

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
    for part in ("transformers eager", "tinyllama sdpa", "greedy, batch of 4", "sampled, alone"):
        assert part in out
    assert "FAILED" not in out
    assert out.endswith("\nparity: passed\n")


def test_without_a_model_the_planted_bugs_are_tried_too(parity, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "resolve", lambda name: asked.append(name) or tiny)
    status, out, _ = parity("--quick", "--dtype", "float64")
    assert (status, asked) == (0, [hub.EMBEDDED_MODEL])
    assert "16 of 16" in out
    assert "unit-gain fixture" in out


def test_json_and_page_have_the_dtypes_from_the_widest_to_the_narrowest(parity, tiny, tmp_path):
    dtypes = ("--dtype", "float16", "--dtype", "float64", "--dtype", "bfloat16")
    page = tmp_path / "page.html"
    status, out, err = parity(tiny, *briefly("--json", "--html", page, *dtypes))
    figures = figures_of(out)
    assert (status, figures["passed"], figures["failures"]) == (0, True, [])
    order = ["float64", "float32", "bfloat16", "float16"]
    assert [case["dtype"] for case in figures["cases"]] == order
    assert err.splitlines() == [*(f"tiny {dtype}" for dtype in order), f"wrote {page}"]
    assert figures["machine"]["torch"] == torch.__version__
    assert "tinyllama eager" in page.read_text(encoding="utf-8")


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


def test_progress_without_a_terminal_is_a_line_for_each_step_whose_name_has_no_comma(capsys):
    with progress_line() as done:
        for what in ("tiny float32", "tiny float32, eager", "a\x1b[2Jname"):
            done(what)
    assert capsys.readouterr() == ("", "tiny float32\na\\x1b[2Jname\n")


# --- models and texts ------------------------------------------------------------------------------------


def test_the_default_is_what_is_on_disk_and_with_quick_the_embedded_model_alone(monkeypatch, tmp_path):
    script = load_script("parity")
    monkeypatch.setattr(hub, "on_disk", lambda repo_id: None)
    assert script.default_models(quick=False) == ["smollm2", "tinyllama-shape"]
    monkeypatch.setattr(hub, "on_disk", lambda repo_id: tmp_path if repo_id == hub.DEFAULT_MODEL else None)
    assert script.default_models(quick=False) == ["smollm2", hub.DEFAULT_MODEL, "tinyllama-shape"]
    assert script.default_models(quick=True) == ["smollm2"]


@pytest.mark.parametrize(
    ("quick", "vocabulary", "expected"),
    [(True, 10**9, subjects.QUICK), (False, 10**9, subjects.LARGE), (False, 320, subjects.FULL)],
)
def test_of_a_large_model_less_is_compared(quick, vocabulary, expected):
    args = SimpleNamespace(quick=quick, dtype=None)
    shape = subjects.Shape("", tiny_config(vocab_size=vocabulary))
    assert load_script("parity").extent(args, shape) == expected


def test_the_official_model_is_known_by_its_folder_and_has_the_notebook_s_texts(parity, tiny, monkeypatch):
    # However the folder is spelled.
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "text.txt").write_text(TEXT)
    options = ("tiny", "--quick", "--dtype", "float32", "--text", "text.txt")
    monkeypatch.setattr(suite, "notebook_failures", lambda model, tokenizer: ["notebook, greedy: differs"])
    monkeypatch.setattr(hub, "on_disk", lambda repo_id: tiny)
    status, out, _ = parity(*options)
    assert status == 1
    assert out.endswith("tiny float32: notebook, greedy: differs\nparity: FAILED\n")


def test_the_user_s_text_is_what_is_compared_and_stdin_serves_both_models(parity, tiny, monkeypatch):
    stdin = SimpleNamespace(buffer=SimpleNamespace(read=iter([TEXT.encode(), b""]).__next__))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, _ = parity(tiny, "--against", tiny, *briefly("--text", "-", "--json"))
    (case,) = figures_of(out)["cases"]
    count = len(tinyllama.Tokenizer.from_folder(tiny).encode(TEXT))
    assert (status, case["texts"]) == (0, {"text.txt": count, "-": count})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("tiny", "--text", "latin.txt"), "byte 3 (0xe9) is not UTF-8"),
        (("tiny", "--text", "absent.txt"), "absent.txt: cannot be read"),
        (("tiny", *briefly("--text", "empty.txt")), "empty.txt: expected a text of 2 tokens"),
        (("no-such-model",), "model 'no-such-model': no such folder"),
        (("no-such-model", "--html", "absent/page.html"), "make the folder first"),
        (("tinyllama-shape", "--device", "nonsense"), "nonsense"),
        (("tinyllama-shape", "--text", "text.txt"), "no tokenizer"),
        (("no-such-model", "--attention", "raises.py:f"), "raises.py:1: ValueError: two; correct"),
        (("no-such-model", "--attention", "absent.py:f"), "absent.py: no such file"),
        (("no-such-model", "--attention", "my.py:absent"), "expected a function 'absent'"),
        (("no-such-model", "--attention", "flash"), "expected eager, sdpa, window"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_before_any_work(parity, tiny, files, options, expected):
    (files / "latin.txt").write_bytes(b"caf\xe9")
    (files / "empty.txt").touch()
    (files / "raises.py").write_text("raise ValueError('two\\nlines')")
    assert_refused(parity(*(tiny if option == "tiny" else option for option in options)), expected)


# --- kernels ---------------------------------------------------------------------------------------------


def test_a_wrong_kernel_fails_and_the_operation_is_named(parity, tiny):
    status, out, _ = parity(tiny, *briefly("--attention", "my.py:louder"))
    assert status == 1
    assert "first divergence at layers.0.self_attn.z, " in out
    assert "suspect: none that is known\n" in out
    assert "\ntiny float32: tinyllama my.py:louder: relRMS " in out
    assert out.endswith("\nparity: FAILED\n")


def test_a_right_kernel_passes_and_diverges_nowhere(parity, tiny):
    attention = ("--attention", "my.py:textbook", "--attention", "sdpa")
    status, out, _ = parity(tiny, *briefly(*attention, "--bisect"))
    assert status == 0
    for kernel in ("my.py:textbook", "sdpa"):
        assert f"tinyllama {kernel}, on all texts: no divergence" in out
    assert out.endswith("parity: passed\n")


def test_two_kernels_of_one_kind_pass_against_each_other(parity, tiny):
    # Neither is transformers' attention: only the other kernel can be the truth.
    status, out, _ = parity(tiny, *briefly("--attention", "my.py:window", "--against", "other.py:window"))
    assert (status, out.splitlines()[-1]) == (0, "parity: passed")
    assert "reference: other.py:window" in out


@pytest.mark.parametrize(
    ("kernel", "other", "suspect"),
    [
        ("my.py:window", "eager", "a token sees at most itself and the 7 before it"),
        ("eager", "my.py:window", "none that is known"),  # measured from the oracle there is no divergence
    ],
)
def test_two_kernels_of_different_kinds_differ_first_where_the_mask_is(parity, tiny, kernel, other, suspect):
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


def test_a_wrong_checkpoint_fails_against_the_original_and_the_place_is_named(parity, tiny, tmp_path):
    model = tiny_model()
    projection = model.layers[2].self_attn.k_proj
    with torch.no_grad():
        projection.weight.copy_(as_meta(projection.weight))
    status, out, _ = parity(save(model, tmp_path / "meta"), "--against", tiny, *briefly())
    assert status == 1
    assert "first divergence at layers.2.self_attn.k_proj" in out
    assert "pair order of Meta's" in out
    assert "\nmeta against tiny float32: tinyllama eager: relRMS " in out
    wide = save(tiny_model(hidden_size=128), tmp_path / "wide")
    status, out, _ = parity(wide, "--against", tiny, *briefly())
    assert status == 1
    assert "first divergence at embed_tokens" in out


def test_a_checkpoint_with_another_vocabulary_is_refused(parity, tiny, tmp_path):
    other = save(tiny_model(vocab_size=330), tmp_path / "other")
    expected = "other: expected tiny's vocabulary of 320 ids, got 330"
    assert_refused(parity(other, "--against", tiny, *briefly()), expected)


# --- the notebook ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "failing"),
    [([], []), ([5], ["greedy", "greedy chat", "sampled chat"]), ([0], ["greedy chat", "sampled chat"])],
    ids=["the notebook's own", "other texts", "other ids with the same texts"],
)
def test_each_text_of_the_notebook_that_differs_has_its_line(more, failing):
    cases = {tuple(case["prompt_ids"] + list(case["settings"].values())): case for case in notebook_cases()}
    texts = {tuple(case.get("ids", [*case["prompt_ids"], 7])): case["text"] for case in cases.values()}

    def generate(model, prompts, **settings):
        key = (*prompts[0], *settings.values())
        case = cases[key]
        return [[*case.get("ids", [7]), *more]]

    class Decoder:
        """A tokenizer that knows the notebook's texts; ids after an id 0 are not seen."""

        def decode(self, ids, skip_special):
            assert skip_special
            return texts.get(tuple(ids[: ids.index(0)] if 0 in ids else ids), "another text")

    lines = notebook_failures(None, Decoder(), generate)
    assert [line.partition(":")[0] for line in lines] == [f"notebook, {name}" for name in failing]
