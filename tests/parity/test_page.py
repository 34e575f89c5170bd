"""The HTML report: it says what the report holds, and a browser can show it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, is_dataclass, replace
from itertools import combinations
from typing import Any

import pytest
import torch

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
from tests.parity.test_suite import Subject, Trained
from tinyllama.attention import eager
from tinyllama.kernels import KERNELS
from tinyllama.pages import plain
from tinyllama.pages.chart import Chart
from tinyllama.parity.changed import changed
from tinyllama.parity.charts import ZERO_NOTE, layer_chart, position_charts
from tinyllama.parity.continuations import IdFlip
from tinyllama.parity.mutations import MUTATIONS, Mutation
from tinyllama.parity.notebook import Notebook
from tinyllama.parity.page import formatted, page
from tinyllama.parity.report import Case, Report
from tinyllama.parity.subjects import Extent
from tinyllama.parity.suite import Suite
from tinyllama.progress import escape

pytestmark = pytest.mark.usefixtures("one_thread")


def nan(q, k, v, context):
    return eager(q, k, v * torch.nan, context)


def louder(q, k, v, context):
    return eager(q, k, 1.5 * v, context)


@pytest.fixture(scope="module")
def results() -> Report:
    """A suite's report on tiny models, with what passes, what fails, and something in every section."""
    suite, none = Suite(), Mutation("none", lambda model: changed())
    extent = Extent(("float64", "float32"), 0, prompts=1, greedy_ids=1, seeds=1, sampled_ids=1)
    suite.judge(Trained(intermediate_size=192), KERNELS, extent)
    suite.judge(
        Subject(), {"eager": eager, "nan": nan, "louder": louder}, replace(extent, dtypes=("bfloat16",))
    )
    suite.judge_fixture([MUTATIONS[0], none, replace(none, address="norm")])
    report = suite.report
    report.machine = {"cpu": "a processor", "cores": 2, "gpu": None}
    report.notebook.append(Notebook("tiny", "float32", []))
    flip = IdFlip({"temperature": 0.7, "seed": 3}, 1, 7, 5, 9, margin=1e-6, limit=6e-5)
    report.continuations[0] = replace(report.continuations[0], flips=[flip])
    last = report.searches[-1]
    assert last.found is not None
    skipped = replace(last.found, shape=(), place=(), suspect=None)
    report.searches += [replace(last, found=None), replace(last, found=skipped)]
    return report


@pytest.fixture(scope="module")
def float32(results) -> Case:
    return results.cases[1]


@pytest.fixture(scope="module")
def rounding(results) -> Case:
    """8-bit weights against the full ones: no reference, and limits of their own."""
    return results.cases[3]


@pytest.fixture(scope="module")
def read(results) -> Read:
    return Read(page(results))


def test_every_figure_is_shown_as_it_is(results, read):
    whole = plain(results)
    for key, (exact, text) in read.shown.items():
        assert json.loads(exact) == value_at(whole, key)
        assert text == escape(formatted(key, value_at(results, key))), key


def test_no_figure_is_missing(results, read):
    """Except what is drawn or said in words, the references' flips, and all gradients but the worst."""
    said = r"passed|.*\.(reference|harmless|dtype|model|near_tie|note|found|suspect)|cases\.\d\.texts\..*"
    said += r"|.*\.(by_position|settings)\..*|.*\.(shape|expected_shape|place)\.\d|.*failures\..*"
    said += rf"|cases\.\d\.rows\.[01]\.flips.*|searches\.{len(results.searches) - 1}\..*"
    said += r"|gradients\.\d\.(rows|worst\.(passed|same_bits)).*"
    missing = [key for key in leaves(plain(results)) if key not in read.shown]
    assert [key for key in missing if not re.fullmatch(said, key)] == []


def test_text_from_outside_is_only_text(results, read):
    def spoilt(value: Any, key: str = "") -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            named = {field.name: getattr(value, field.name) for field in fields(value)}
            return replace(value, **{name: spoilt(part, name) for name, part in named.items()})
        if isinstance(value, dict):
            # The page's own words name the machine's figures; the others have names from outside.
            return {name + HOSTILE * (key != "machine"): spoilt(part, name) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [spoilt(part, key) for part in value]
        return value + HOSTILE if isinstance(value, str) and value and key != "dtype" else value

    source = page(spoilt(results))
    bad = Read(source)
    assert bad.tags == read.tags
    assert not {"\u202e", "\x07"} & set(source)
    assert bad.text.count("<script>alert(1)</script>\"'</style>&\\u202e\\x07{{ 7 * 7 }}") > 40
    nothing_but_the_one_style_is_allowed(source)


def test_a_failing_report_begins_with_its_failures(results, read):
    places = [read.text.index(line) for line in ("parity: FAILED", *results.failures, "Summary")]
    assert len(results.failures) > 5
    assert places == sorted(places)


def test_sections_without_results_are_left_out(read):
    empty = Read(page(Report()))
    assert "parity: passed" in empty.text
    assert [value for name, value in empty.attributes if name == "id"] == ["summary", "terms", "machine"]
    assert [value for name, value in read.attributes if name == "id"] == [
        *(
            "summary",
            "terms",
            "case-0",
            "case-1",
            "case-2",
            "case-3",
            "case-4",
            "ids",
            "gradients",
            "mutations",
            "searches",
        ),
        *("notebook", "machine"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("cases.1.rows.3.relative", math.nan, "not finite"),
        ("cases.1.rows.3.same_bits", False, "differ"),
        ("cases.0.rows.0.same_bits", None, ""),
        ("cases.0.limits.kl_mean", math.inf, "none"),
        ("cases.0.limits.top1", -math.inf, "none"),
        ("cases.0.limits.top1", 0.95, "95.00%"),
        ("cases.0.limits.nll_change", 0.00995, "+1.0e-02"),
        ("cases.0.rows.2.relative", 1.1e-6, "1.10e-06"),
        ("cases.0.positions", 1297, "1,297"),
        ("cases.1.rows.2.flips.0.expected", 49151, "49151"),
        ("machine.gpu", None, "none"),
        ("mutations.0.score", 890048.57, "890,049"),
        ("mutations.1.score", 1.0128, "1.01"),
        ("mutations.2.right", False, "NO"),
        ("searches.0.found.got", -1.23456789, "-1.23456789"),
        ("continuations.1.flips.0.settings", {"temperature": 0.7, "seed": 3}, "temperature 0.7, seed 3"),
    ],
)
def test_how_a_figure_is_written(key, value, text):
    assert formatted(key, value) == text


def test_notes_stand_only_where_they_apply(results, float32):
    def notes(case: Case, note: str = "") -> int:
        return page(Report(cases=[replace(case, note=note)])).count('class="note"')

    assert (notes(float32), notes(float32, "Something was not judged.")) == (0, 1)
    # In float64 transformers itself is over the limit, which the page explains.
    assert notes(results.cases[0]) == 1


def points(chart: Chart, style: str) -> list[tuple[float, float]]:
    (curve,) = (curve for curve in chart.curves if curve.style == style)
    pairs = [point.split(",") for line in curve.lines for point in line.split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_the_limit_is_drawn_in_units_of_the_references_error(float32):
    chart = layer_chart(float32)
    assert chart is not None
    assert chart.curves[0].name == "limit: 2 R"
    band = [float(point.split(",")[1]) for point in chart.band[0].split()]
    ours, limit = points(chart, "series-0"), points(chart, "limit")
    # The embedding's error is zero, which a log axis has no place for.
    assert len(ours) == len(limit) == 6
    assert chart.notes == (ZERO_NOTE,)
    assert all(top < mine for (_, top), (_, mine) in zip(limit, ours, strict=True))
    assert min(band) > min(y for _, y in limit)


def test_what_cannot_be_compared_is_not_drawn(float32, rounding):
    chart = layer_chart(rounding)
    assert chart is not None
    assert (len(chart.curves), chart.band_name) == (1, "")
    *theirs, ours, _, _ = float32.rows
    lacking = replace(ours, by_layer=ours.by_layer[1:])
    case = replace(float32, rows=[*theirs, lacking])
    chart = layer_chart(case)
    assert chart is not None
    assert [curve.style for curve in chart.curves] == ["limit"]
    assert "Error by layer in numbers" not in page(Report(cases=[case]))
    nothing = replace(ours, relative=math.nan, by_layer=[], by_position={})
    assert "<svg" not in page(Report(cases=[replace(float32, rows=[nothing])]))


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e-7, 1.0, 1e306])
def test_curves_of_any_size(rounding, error):
    row = rounding.rows[0]
    row = replace(row, by_layer=[error] * 33, by_position={text: [error] for text in row.by_position})
    case = replace(rounding, rows=[row])
    for chart in filter(None, [layer_chart(case), *position_charts(case)]):
        assert len(chart.ys) >= 2
        assert all(0 <= y <= 276 for curve in chart.curves for _, y in points(chart, curve.style))
    assert page(Report(cases=[case]))


@pytest.fixture(scope="module")
def browser():
    with running_browser() as running:
        yield running


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_never_scrolls_sideways(browser, tmp_path, results, width):
    long = Notebook("some-llama", "float32", ["a-long-name-without-a-space-" * 9])
    with opened(browser, tmp_path, page(replace(results, notebook=[long])), width, 740) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        boxes = tab.evaluate(
            "[...document.querySelectorAll('.scroll')].map(box => box.getBoundingClientRect().right)"
        )
    assert max(boxes) <= width


def test_charts_are_drawn(browser, tmp_path, results):
    with opened(browser, tmp_path, page(results), 360, 740) as tab:
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
        beyond = [box for box in chart if not 0 <= box[0] <= box[2] <= 460]
        assert not beyond, beyond
        assert not any(overlap(*pair) for pair in combinations(chart, 2))


def test_every_text_can_be_read_in_light_and_in_dark(browser, tmp_path, results):
    read_in_both_schemes(browser, tmp_path, page(results))
