"""The walkthrough: both languages are of one source, and its code prints what is kept."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests.marks import slow
from tests.walkthrough.build import FOLDER, LANGUAGES, SOURCES, cells, notebook, run, stored
from tinyllama.config import LlamaConfig
from tinyllama.hooks import addresses
from tinyllama.model import Llama

BY_SOURCE = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
NUMBER = re.compile(r"-?\d+\.\d+")


def texts(made):
    """What the code printed, cell by cell."""
    return [
        "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
        for cell in made.cells
        if cell.cell_type == "code"
    ]


@BY_SOURCE
def test_both_languages_are_of_one_source(source):
    kinds = [kind for kind, _ in cells(source)]
    assert kinds.count("text") == kinds.count("中文") > 10
    assert all(after == "中文" for kind, after in itertools.pairwise(kinds) if kind == "text")
    for language in LANGUAGES:
        made, kept = notebook(source, language), stored(source, language)
        assert [(cell.id, cell.source) for cell in made.cells] == [
            (cell.id, cell.source) for cell in kept.cells
        ]
    one, other = (stored(source, language) for language in LANGUAGES)
    outputs = [[cell.outputs for cell in made.cells if cell.cell_type == "code"] for made in (one, other)]
    assert outputs[0] == outputs[1]


def assert_prints_what_is_kept(source, leave_out=lambda code: False):
    """Every word and every whole number; other numbers to a few digits."""
    ran, kept = notebook(source, "text"), stored(source, "text")
    for one in (ran, kept):
        one.cells = [cell for cell in one.cells if not leave_out(cell.source)]
    for got, shown in zip(texts(run(ran)), texts(kept), strict=True):
        assert NUMBER.sub("#", got) == NUMBER.sub("#", shown)
        for number, expected in zip(NUMBER.findall(got), NUMBER.findall(shown), strict=True):
            assert float(number) == pytest.approx(float(expected), rel=2e-2, abs=2e-3)


@BY_SOURCE
def test_its_code_but_for_long_texts_prints_what_is_kept(source, smollm2_folder):
    # Where it continues a text beside transformers: tests/test_trained.py compares such ids.
    assert_prints_what_is_kept(source, lambda code: "theirs.generate(" in code)


@slow
@BY_SOURCE
def test_its_code_prints_what_is_kept(source, smollm2_folder):
    assert_prints_what_is_kept(source)


def test_what_is_kept_is_as_promised():
    """The figures that a reader is told to expect; no warning, no error, no place on a machine."""
    said = {source.stem: "".join(texts(stored(source, "text"))) for source in SOURCES}
    assert said["first-steps"].count("the same in transformers: True") == 6
    assert "1,100,048,384 in TinyLlama" in said["first-steps"]
    assert "the same bits: True" in said["first-steps"]
    assert "False" not in said["open-the-box"]
    assert "suspect: LayerNorm is used for RMSNorm" in said["open-the-box"]
    for source in SOURCES:
        for ending in LANGUAGES.values():
            text = source.with_suffix(ending).read_text("utf-8")
            assert not re.search(r"site-packages|Warning|Traceback|/home/|/lib/python", text)


@pytest.mark.skipif(
    "TINYLLAMA_SHARED" not in os.environ, reason="TINYLLAMA_SHARED, with golden values, is not set"
)
def test_the_tables_of_tinyllama_are_transformers_own():
    golden = json.loads(
        (Path(os.environ["TINYLLAMA_SHARED"]) / "golden/seed_notebook.json").read_text("utf-8")
    )
    for ending in LANGUAGES.values():
        text = (FOLDER / "first-steps").with_suffix(ending).read_text("utf-8")
        for said in ("Hello World!", "Greetings!", "你好，世界"):
            assert f"| `{said}` | {', '.join(map(str, golden['encode'][said]))} |" in text
        assert golden["chat"]["rendered"].strip().replace("\n", '\\n",\n    "') in text
        assert golden["greedy"][1]["text"] in text
        assert f"{golden['num_parameters']:,}" in text


@pytest.mark.parametrize("name", ["reading-the-model.md", "reading-the-model.zh-TW.md"])
def test_the_reading_guide_names_every_address_and_the_notebook_s_numbers(name):
    text = (FOLDER.parent / name).read_text("utf-8")
    config = LlamaConfig(num_hidden_layers=1)
    with torch.device("meta"):
        known = addresses(Llama(config))
    named = set(re.findall(r"[.`](\w+)`", text))
    assert {address.rpartition(".")[2] for address in known} - {"0"} <= named
    printed = "".join(texts(stored(FOLDER / "open-the-box.txt", "text")))
    for number in ("0.083", "0.098", "0.274", "0.726", "0.573"):
        assert number in text
        assert number in printed
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (FOLDER.parent / link).exists(), link


def test_links_of_the_readmes_and_notebooks_lead_somewhere():
    pages = [FOLDER.parents[1] / "README.md", FOLDER.parents[1] / "README.zh-TW.md", *FOLDER.glob("*.ipynb")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)
