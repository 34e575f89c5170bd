"""The HTML report: what it says equals the figures, and what a browser makes of it."""

from __future__ import annotations

import copy
import json
import re
from itertools import combinations
from typing import Any

import pytest

from tests.pages import (
    HOSTILE,
    Read,
    leaves,
    nothing_but_the_one_style_is_allowed,
    opened,
    overlap,
    read_in_both_schemes,
    running_browser,
    value_at,
)
from tinyllama.parity.charts import NOT_DRAWN, Chart, layer_chart, position_charts
from tinyllama.parity.page import formatted, page
from tinyllama.parity.report import SECTIONS, concluded
from tinyllama.progress import escape

LAYERS = 30


def a_row(who: str, error: float, reference: bool = False, **other: Any) -> dict[str, Any]:
    layers = [0.0, *(error * (1 + layer / LAYERS) / 2 for layer in range(LAYERS)), error, error]
    row = {
        "who": who,
        "reference": reference,
        **{name: error * factor for name, factor in (("relative", 1), ("rms", 9), ("mean", 7), ("max", 80))},
        **{name: error * 1e-4 * factor for name, factor in (("kl_mean", 1), ("kl_p99", 4), ("kl_max", 30))},
        "top1": 1.0,
        "nll_change": -error / 3,
        "flips": [],
        "same_bits": None if reference else True,
        "by_layer": layers,
        "by_position": {"english": [error * (1 + n / 20) for n in range(40)], "note.txt": [error]},
        "failures": [],
    }
    return row | other


def a_case(dtype: str, limit: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "some-llama",
        "dtype": dtype,
        "positions": 1297,
        "texts": {"english": 1280, "note.txt": 17},
        "bin": 32,
        "note": "Something was not judged.",
        "limits": {"relative": limit, "kl_mean": None, "kl_max": 1e-9, "flip_margin": 6.3e-5}
        | {"top1": None, "nll_change": None},
        "rows": rows,
    }


def a_rounding() -> dict[str, Any]:
    """8-bit weights against the full ones: no reference, and limits of its own."""
    case = a_case("float32", 0.0, [a_row("tinyllama int8", 0.02, same_bits=None)])
    limits = {"relative": None, "kl_mean": 0.01, "kl_max": None, "flip_margin": None}
    return case | {"limits": limits | {"top1": 0.95, "nll_change": 0.00995}}


def a_flip(position: int, margin: float | None) -> dict[str, Any]:
    return {"text": "english", "position": position, "expected": 49151, "chosen": 28, "margin": margin}


def references(error: float) -> list[dict[str, Any]]:
    return [a_row("transformers eager", error, True), a_row("transformers sdpa", error * 0.8, True)]


def a_search(**found: Any) -> dict[str, Any]:
    step = {"address": "layers.0.self_attn.q_rot", "relative": 0.31, "reference": 2e-3, "limit": 4e-3}
    place = {
        **step,
        "shape": [64, 9, 64],
        "place": [63, 8, 1],
        "got": -1.23456789,
        "expected": 0.5,
        "theirs": 0.501,
        "suspect": "theta is 500000, not 10000",
        "path": [step | {"address": f"layers.{layer}", "relative": 1e-3} for layer in range(9)] + [step],
    }
    return {
        "model": "some-llama",
        "dtype": "bfloat16",
        "who": "tinyllama sdpa",
        "text": "english, first 128 tokens",
        "found": place | found,
    }


def mutations() -> list[dict[str, Any]]:
    names = ("name", "harmless", "score", "passed", "address", "suspect", "right")
    return [
        dict(zip(names, values, strict=True))
        for values in (
            ("eps 0", False, 890048.57, False, "layers.0.input_layernorm", "eps is 0, not 1e-05", True),
            ("positions + 1", True, 1.0128, True, None, None, True),
            ("gate and up swapped", False, None, True, None, None, False),
        )
    ]


def some_figures() -> dict[str, Any]:
    """A case that passes, one that fails, and something in every section."""
    broken = a_row("tinyllama sdpa", 0.5, same_bits=False, relative=None, kl_max=None, top1=0.25)
    broken["by_layer"] = broken["by_layer"][:9] + [None] * (LAYERS - 6)
    broken["flips"] = [a_flip(position, None if position == 3 else position / 7) for position in range(40)]
    broken["failures"] = ["a logit is not finite", "relRMS nan is over 1.5 R = 3.12e-02"]
    near = a_row("tinyllama eager", 0.021, flips=[a_flip(5, 0.047)])
    parted = {"settings": {"temperature": 0.7, "seed": 3}, "prompt": 1, "step": 7, "expected": 5, "chosen": 9}
    part = {"model": "some-llama", "dtype": "float32", "failures": []}
    worst = {"weight": "norm.weight", "relative": 3e-6, "reference": 2e-6, "limit": 4e-6}
    return concluded(
        {
            "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "torch": "2.13.0"},
            "cases": [
                a_case("float32", 2e-6, [*references(1e-6), a_row("tinyllama eager", 1.1e-6)]),
                a_case("bfloat16", 0.03, [*references(0.02), near, broken]),
                a_rounding(),
            ],
            "continuations": [
                part | {"what": "greedy", "calls": 10, "ids": 2000, "flips": []},
                part
                | {"what": "sampled", "calls": 1, "ids": 20}
                | {"flips": [parted | {"margin": 1e-6, "limit": 6e-5, "near_tie": True}]},
            ],
            "gradients": [part | {"positions": 64, "weights": 39, "same_bits": 38, "worst": worst}],
            "notebook": [part],
            "mutations": mutations(),
            "searches": [
                a_search(),
                a_search(relative=None, shape=[], place=[], suspect=None),
                a_search() | {"found": None},
            ],
        }
    )


def nothing() -> dict[str, Any]:
    return concluded({"machine": {"cpu": "a processor"}, **{name: [] for name in SECTIONS}})


def test_every_figure_is_shown_as_it_is():
    figures = some_figures()
    read = Read(page(figures))
    for key, (exact, text) in read.shown.items():
        value = value_at(figures, key)
        assert json.loads(exact) == value
        assert text == escape(formatted(key, value)), key


def test_no_figure_is_missing():
    """But for those that are drawn, told in words, or the references' own flips."""
    figures = some_figures()
    shown = Read(page(figures)).shown
    told = r"passed|.*\.(bin|reference|harmless|dtype|model)|cases\.\d\.texts\..*|.*\.by_position\..*"
    told += r"|.*\.settings\..*|.*\.(shape|place)\.\d|.*\.rows\.\d\.failures\..*|searches\.1\..*|.*\.found"
    missing = [key for key in leaves(figures) if key not in shown and not re.fullmatch(told, key)]
    assert missing == []


def test_text_from_outside_is_only_text():
    def spoilt(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            # The page's own words name the figures; only texts have names from outside.
            named = key in ("texts", "by_position", "settings")
            return {name + HOSTILE * named: spoilt(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [spoilt(part) for part in value]
        return value + HOSTILE if isinstance(value, str) else value

    source = page(spoilt(some_figures()))
    plain, read = Read(page(some_figures())), Read(source)
    assert read.tags == plain.tags
    assert not {"\u202e", "\x07"} & set(source)
    assert read.text.count("<script>alert(1)</script>\"'</style>&\\u202e\\x07{{ 7 * 7 }}") > 40


def test_nothing_but_the_one_style_is_allowed():
    nothing_but_the_one_style_is_allowed(page(some_figures()))


def test_a_failing_report_begins_with_its_failures():
    figures = some_figures()
    text = Read(page(figures)).text
    places = [text.index(line) for line in ("parity: FAILED", *figures["failures"], "Summary")]
    assert len(figures["failures"]) == 3
    assert places == sorted(places)


def test_sections_without_figures_are_left_out():
    read = Read(page(nothing()))
    assert "parity: passed" in read.text
    assert "Nothing was judged" in read.text
    assert [value for name, value in read.attributes if name == "id"] == ["summary", "terms", "machine"]
    ids = [value for name, value in Read(page(some_figures())).attributes if name == "id"]
    assert ids == [
        *("summary", "terms", "case-0", "case-1", "case-2", "ids", "gradients", "mutations", "searches"),
        *("notebook", "machine"),
    ]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("cases.1.rows.3.relative", "not finite"),
        ("cases.1.rows.3.same_bits", "others"),
        ("cases.0.rows.0.same_bits", ""),
        ("cases.0.limits.kl_mean", "none"),
        ("cases.0.rows.2.relative", "1.10e-06"),
        ("cases.0.limits.top1", "none"),
        ("cases.2.limits.top1", "95.00%"),
        ("cases.2.limits.nll_change", "+1.0e-02"),
        ("cases.2.limits.relative", "none"),
        ("cases.2.note", "Something was not judged."),
        ("cases.0.rows.2.top1", "100.00%"),
        ("cases.0.positions", "1,297"),
        ("cases.1.rows.3.flips.3.margin", "not finite"),
        ("cases.1.rows.2.flips.0.expected", "49151"),
        ("machine.gpu", "none"),
        ("mutations.0.score", "890,049"),
        ("mutations.1.score", "1.01"),
        ("mutations.2.right", "NO"),
        ("searches.0.found.got", "-1.23456789"),
        ("continuations.1.flips.0.settings", "temperature 0.7, seed 3"),
    ],
)
def test_how_a_figure_is_written(key, text):
    assert Read(page(some_figures())).shown[key][1] == text


def test_float64_says_why_the_references_are_worse():
    note = "transformers computes its norms"
    float64 = a_case("float64", 1e-12, [*references(1e-7), a_row("tinyllama eager", 1e-15)])
    assert note in Read(page(nothing() | {"cases": [float64]})).text
    assert note not in Read(page(some_figures())).text


def test_a_note_has_its_line_and_none_has_none():
    case = a_case("float32", 1e-5, [])
    assert 'class="note"' in page(nothing() | {"cases": [case]})
    assert 'class="note"' not in page(nothing() | {"cases": [case | {"note": ""}]})


def test_without_a_reference_a_chart_has_no_limit_and_no_band():
    chart = layer_chart(a_rounding())
    assert chart is not None
    assert ([curve.name for curve in chart.curves], chart.band_name) == (["tinyllama int8"], "")


def points(chart: Chart, style: str) -> list[tuple[float, float]]:
    (curve,) = (curve for curve in chart.curves if curve.style == style)
    pairs = [point.split(",") for line in curve.lines for point in line.split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_the_limit_is_drawn_in_units_of_the_references_error():
    chart = layer_chart(some_figures()["cases"][0])
    assert chart is not None
    assert chart.curves[0].name == "limit: 2 R"
    band = [float(point.split(",")[1]) for point in chart.band[0].split()]
    ours, limit = points(chart, "series-0"), points(chart, "limit")
    # The embedding's error is zero, which is left out.
    assert len(ours) == len(limit) == LAYERS + 2
    assert chart.notes == (NOT_DRAWN[0.0],)
    assert all(top < mine for (_, top), (_, mine) in zip(limit, ours, strict=True))
    assert min(band) > min(y for _, y in limit)


def test_a_curve_of_another_length_is_not_drawn():
    case = copy.deepcopy(some_figures()["cases"][0])
    del case["rows"][2]["by_layer"][7]
    chart = layer_chart(case)
    assert chart is not None
    assert [curve.style for curve in chart.curves] == ["limit"]
    assert "Error by layer in numbers" not in page(nothing() | {"cases": [case]})


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e-7, 1.0, 1e306])
def test_curves_of_any_size(error):
    case = a_case("float32", 1e-5, [a_row("tinyllama", error)])
    drawn = [layer_chart(case), *position_charts(case)]
    for chart in [chart for chart in drawn if chart]:
        assert len(chart.ys) >= 2
        assert all(0 <= y <= 276 for curve in chart.curves for _, y in points(chart, curve.style))
    assert page(nothing() | {"cases": [case]})


def test_a_case_without_a_curve():
    rows = [a_row("tinyllama", 1.0, relative=None, by_layer=[], by_position={})]
    assert "<svg" not in page(nothing() | {"cases": [a_case("float32", 1e-5, rows)]})


@pytest.fixture(scope="module")
def browser():
    with running_browser() as running:
        yield running


def test_the_browser_has_the_figures(browser, tmp_path):
    figures = some_figures()
    with opened(browser, tmp_path, page(figures)) as tab:
        cells = tab.evaluate(
            "[...document.querySelectorAll('[data-key]')]"
            ".map(cell => [cell.dataset.key, cell.dataset.value, cell.textContent])"
        )
    assert len(cells) > 300
    for key, exact, text in cells:
        assert json.loads(exact) == value_at(figures, key)
        assert text == escape(formatted(key, value_at(figures, key)))


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_never_scrolls_sideways(browser, tmp_path, width):
    figures = some_figures()
    figures["failures"].append("some-llama: " + "a-long-name-without-a-space-" * 9)
    with opened(browser, tmp_path, page(figures), width, 740) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        boxes = tab.evaluate(
            "[...document.querySelectorAll('.scroll')].map(box => box.getBoundingClientRect().right)"
        )
    assert max(boxes) <= width


def test_charts_are_drawn(browser, tmp_path):
    with opened(browser, tmp_path, page(some_figures()), 360, 740) as tab:
        sizes = tab.evaluate(
            "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect())"
            ".map(box => Math.min(box.width, box.height))"
        )
        finite = tab.evaluate(
            "[...document.querySelectorAll('polyline, polygon')].map(line => line.points.length > 1"
            " && [...line.points].every(point => isFinite(point.x) && isFinite(point.y)))"
        )
        labels = tab.evaluate(
            "[...document.querySelectorAll('.chart > svg')].map(svg => [...svg.querySelectorAll('text')]"
            ".map(text => { const t = text.getBBox(); return [t.x, t.y, t.x + t.width, t.y + t.height] }))"
        )
    assert min(sizes) > 5
    assert len(finite) > 8
    assert all(finite)
    for chart in labels:
        assert all(left >= 0 and right <= 460 for left, _, right, _ in chart)
        assert not any(overlap(*pair) for pair in combinations(chart, 2))


def test_every_text_can_be_read_in_light_and_in_dark(browser, tmp_path):
    read_in_both_schemes(browser, tmp_path, page(some_figures()))
