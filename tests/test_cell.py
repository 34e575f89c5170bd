"""What results show at the end of a notebook's cell: a table or a picture, in which every text is escaped."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.pages import HOSTILE, Read
from tests.shapes import tiny_model
from tinyllama.lab.contract import Clause, Contract
from tinyllama.lab.interpretation import HeadScores
from tinyllama.pages import cell
from tinyllama.parity.comparison import compare
from tinyllama.text.routes import TakenApart, TokenRow

ROW = TokenRow(0, 5, HOSTILE, "5b", "text", HOSTILE)
CLAUSE = Clause(HOSTILE, HOSTILE, False, HOSTILE, "BROKEN")
SCORES = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.95, 0.4]])


def rows_of(html):
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", html)]


@pytest.mark.parametrize(
    "shown",
    [
        cell.table(HOSTILE, [HOSTILE], [[HOSTILE]]),
        str(cell.squares({HOSTILE: 0.5})),
        TakenApart(HOSTILE, [ROW], [])._repr_html_(),
        Contract(HOSTILE, (CLAUSE,))._repr_html_(),
    ],
)
def test_a_text_brings_no_tags_and_no_invisible_characters(shown):
    assert set(Read(shown).tags) <= {"table", "caption", "b", "thead", "tbody", "tr", "th", "td", "span"}
    assert "\u202e" not in shown
    assert "\x07" not in shown


def test_a_page_in_a_frame_cannot_leave_it():
    framed = Read(cell.frame(HOSTILE, f"<p>{HOSTILE}</p>"))
    assert framed.tags == ["iframe"]
    assert dict(framed.attributes)["sandbox"] == "allow-scripts"
    assert dict(framed.attributes)["srcdoc"] == f"<p>{HOSTILE}</p>"


def test_a_contract_is_its_lines_or_a_row_for_each_clause():
    contract = Contract("mine", (Clause("shape", "returns", False, None, "kept"), CLAUSE))
    assert repr(contract) == str(contract)
    assert rows_of(contract._repr_html_())[1] == ["kept", "shape", "returns"]


def test_head_scores_name_the_strongest_heads_and_draw_all():
    scores = HeadScores(previous=SCORES, induction=SCORES.flip(1))
    assert scores.strongest("previous", 1) == "layer 1 head 1 (0.95)"
    assert repr(scores).splitlines()[-2:] == ["    0   ·░       ░·", "    1  ░█▒       ▒█░"]
    titles = [value for name, value in Read(scores._repr_html_()).attributes if name == "title"]
    assert len(titles) == 12
    assert "layer 1, head 1: 0.95" in titles


def test_a_comparison_shows_both_and_the_verdict():
    model, worse = tiny_model(), tiny_model(seed=1)
    truth = model(torch.tensor([[5, 7, 11]]))[0].double()
    found = compare(lambda ids: SimpleNamespace(logits=worse(ids)), model, [5, 7, 11], truth)
    assert repr(found) == str(found)
    rows = rows_of(found._repr_html_())
    assert [row[0] for row in rows] == ["against the truth", "mine", "reference"]
    assert "<b>FAILED; " in found._repr_html_()
