"""The HTML report: it says what the report holds, and a browser can show it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, is_dataclass, replace
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
from tinyllama.cli.terminal import visible
from tinyllama.pages import plain
from tinyllama.parity.charts import ZERO_NOTE, Chart, layer_chart, position_charts
from tinyllama.parity.continuations import Continuations, IdFlip
from tinyllama.parity.divergence import Divergence, Step
from tinyllama.parity.gradients import Gradients, WeightGradient
from tinyllama.parity.measure import INT8_LIMITS, Limits
from tinyllama.parity.mutations import Trial
from tinyllama.parity.notebook import Notebook
from tinyllama.parity.page import formatted, page
from tinyllama.parity.report import Case, Flip, Report, Row, Search

LAYERS = 30
STEP = Step("layers.0.self_attn.q_rot", 0.31, 2e-3, 4e-3)


def a_row(who: str, error: float, **other: Any) -> Row:
    row = Row(
        who=who,
        reference=False,
        **{name: error * factor for name, factor in (("relative", 1), ("rms", 9), ("mean", 7), ("max", 80))},
        **{name: error * 1e-4 * factor for name, factor in (("kl_mean", 1), ("kl_p99", 4), ("kl_max", 30))},
        top1=1.0,
        nll_change=-error / 3,
        flips=[],
        same_bits=True,
        by_layer=[0.0, *(error * (1 + layer / LAYERS) / 2 for layer in range(LAYERS)), error, error],
        by_position={"english": [error * (1 + n / 20) for n in range(40)], "note.txt": [error]},
        failures=[],
    )
    return replace(row, **other)


def a_case(dtype: str, limit: float, *rows: Row) -> Case:
    texts, limits = {"english": 1280, "note.txt": 17}, Limits(limit, kl_max=1e-9, flip_margin=6.3e-5)
    return Case("some-llama", dtype, texts, "Something was not judged.", limits, list(rows))


def references(error: float) -> list[Row]:
    other = {"reference": True, "same_bits": None}
    return [a_row("transformers eager", error, **other), a_row("transformers sdpa", 0.8 * error, **other)]


FLOAT32 = a_case("float32", 2e-6, *references(1e-6), a_row("tinyllama eager", 1.1e-6))
# 8-bit weights against the full ones: no reference, and limits of their own.
ROUNDING = replace(a_case("float32", 0.0, a_row("tinyllama int8", 0.02, same_bits=None)), limits=INT8_LIMITS)


def a_search(**other: Any) -> Search:
    path = (*(replace(STEP, address=f"layers.{layer}", relative=1e-3) for layer in range(9)), STEP)
    found = Divergence(
        *(STEP.address, STEP.relative, STEP.reference, STEP.limit),
        shape=(64, 9, 64),
        place=(63, 8, 1),
        got=-1.23456789,
        expected=0.5,
        theirs=0.501,
        suspect="theta is 500000, not 10000",
        path=path,
    )
    text = "english, first 128 tokens"
    return Search("some-llama", "bfloat16", "tinyllama sdpa", text, replace(found, **other))


def some_results() -> Report:
    """A case that passes, one that fails, and something in every section."""
    broken = a_row(
        "tinyllama sdpa",
        0.5,
        same_bits=False,
        relative=math.nan,
        kl_max=math.inf,
        top1=0.25,
        by_layer=[0.25] * 9 + [math.nan] * (LAYERS - 6),
        flips=[Flip("english", n, 49151, 28, math.nan if n == 3 else n / 7) for n in range(40)],
        failures=["a logit is not finite", "relRMS nan is over 3.12e-02"],
    )
    near = a_row("tinyllama eager", 0.021, flips=[Flip("english", 5, 49151, 28, 0.047)])
    parted = IdFlip({"temperature": 0.7, "seed": 3}, 1, 7, 5, 9, margin=1e-6, limit=6e-5)
    name = ("some-llama", "float32")
    return Report(
        machine={"cpu": "a processor", "cores": 2, "gpu": None, "torch": "2.13.0"},
        cases=[FLOAT32, a_case("bfloat16", 0.03, *references(0.02), near, broken), ROUNDING],
        continuations=[
            Continuations(*name, "greedy", calls=10, ids=2000, flips=[]),
            Continuations(*name, "sampled", calls=1, ids=20, flips=[parted]),
        ],
        gradients=[Gradients(*name, 64, [WeightGradient("norm.weight", 3e-6, 2e-6, 4e-6, True)])],
        notebook=[Notebook(*name, [])],
        mutations=[
            Trial("eps 0", False, 890048.57, False, STEP.address, "eps is 0, not 1e-05", True),
            Trial("positions + 1", True, 1.0128, True, None, None, True),
            Trial("gate and up swapped", False, math.inf, True, None, None, False),
        ],
        searches=[
            a_search(),
            a_search(relative=math.inf, shape=(), place=(), suspect=None),
            replace(a_search(), found=None),
        ],
    )


@pytest.fixture(scope="module")
def results() -> Report:
    return some_results()


@pytest.fixture(scope="module")
def read(results) -> Read:
    return Read(page(results))


def test_every_figure_is_shown_as_it_is(results, read):
    whole = plain(results)
    for key, (exact, text) in read.shown.items():
        assert json.loads(exact) == value_at(whole, key)
        assert text == visible(formatted(key, value_of(results, key))), key


def value_of(results: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(results, (list, tuple)):
            results = results[int(part)]
        else:
            results = results[part] if isinstance(results, dict) else getattr(results, part)
    return results


def test_no_figure_is_missing(results, read):
    """Except what is drawn, what is said in words, the references' flips, and all gradients but the worst."""
    said = r"passed|.*\.(reference|harmless|dtype|model|near_tie)|cases\.\d\.texts\..*|.*\.by_position\..*"
    said += r"|.*\.settings\..*|.*\.(shape|place)\.\d|.*failures\..*|searches\.1\..*|.*\.found"
    said += r"|gradients\.\d\.(rows|worst\.(passed|same_bits)).*"
    assert [
        key for key in leaves(plain(results)) if key not in read.shown and not re.fullmatch(said, key)
    ] == []


def test_text_from_outside_is_only_text(results, read):
    def spoilt(value: Any, key: str = "") -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            named = {field.name: getattr(value, field.name) for field in fields(value)}
            return replace(value, **{name: spoilt(part, name) for name, part in named.items()})
        if isinstance(value, dict):
            # The page's own words name the machine's figures; the others have names from outside.
            return {name + HOSTILE * (key != "machine"): spoilt(part, name) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [spoilt(part) for part in value]
        return value + HOSTILE if isinstance(value, str) else value

    source = page(spoilt(results))
    bad = Read(source)
    assert bad.tags == read.tags
    assert not {"\u202e", "\x07"} & set(source)
    assert bad.text.count("<script>alert(1)</script>\"'</style>&\\u202e\\x07{{ 7 * 7 }}") > 40
    nothing_but_the_one_style_is_allowed(source)


def test_a_failing_report_begins_with_its_failures(results, read):
    places = [read.text.index(line) for line in ("parity: FAILED", *results.failures, "Summary")]
    assert len(results.failures) == 3
    assert places == sorted(places)


def test_sections_without_results_are_left_out(read):
    empty = Read(page(Report()))
    assert "parity: passed" in empty.text
    assert [value for name, value in empty.attributes if name == "id"] == ["summary", "terms", "machine"]
    assert [value for name, value in read.attributes if name == "id"] == [
        *("summary", "terms", "case-0", "case-1", "case-2", "ids", "gradients", "mutations", "searches"),
        *("notebook", "machine"),
    ]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("cases.1.rows.3.relative", "not finite"),
        ("cases.1.rows.3.same_bits", "differ"),
        ("cases.0.rows.0.same_bits", ""),
        ("cases.0.limits.kl_mean", "none"),
        ("cases.0.rows.2.relative", "1.10e-06"),
        ("cases.0.limits.top1", "none"),
        ("cases.2.limits.top1", "95.00%"),
        ("cases.2.limits.nll_change", "+1.0e-02"),
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
def test_how_a_figure_is_written(read, key, text):
    assert read.shown[key][1] == text


def test_notes_stand_only_where_they_apply():
    def notes(case: Case) -> int:
        return page(Report(cases=[case])).count('class="note"')

    silent = replace(FLOAT32, note="")
    assert (notes(FLOAT32), notes(silent)) == (1, 0)
    # In float64 transformers itself is over the limit, which the page explains.
    far = a_case("float64", 1e-12, *references(1e-7), a_row("tinyllama eager", 1e-15))
    assert notes(replace(far, note="")) == 1


def points(chart: Chart, style: str) -> list[tuple[float, float]]:
    (curve,) = (curve for curve in chart.curves if curve.style == style)
    pairs = [point.split(",") for line in curve.lines for point in line.split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_the_limit_is_drawn_in_units_of_the_references_error():
    chart = layer_chart(FLOAT32)
    assert chart is not None
    assert chart.curves[0].name == "limit: 2 R"
    band = [float(point.split(",")[1]) for point in chart.band[0].split()]
    ours, limit = points(chart, "series-0"), points(chart, "limit")
    # The embedding's error is zero, which a log axis has no place for.
    assert len(ours) == len(limit) == LAYERS + 2
    assert chart.notes == (ZERO_NOTE,)
    assert all(top < mine for (_, top), (_, mine) in zip(limit, ours, strict=True))
    assert min(band) > min(y for _, y in limit)


def test_what_cannot_be_compared_is_not_drawn():
    chart = layer_chart(ROUNDING)
    assert chart is not None
    assert ([curve.name for curve in chart.curves], chart.band_name) == (["tinyllama int8"], "")
    # A curve that lacks a stage.
    short = replace(FLOAT32.rows[2], by_layer=FLOAT32.rows[2].by_layer[1:])
    case = replace(FLOAT32, rows=[*FLOAT32.rows[:2], short])
    chart = layer_chart(case)
    assert chart is not None
    assert [curve.style for curve in chart.curves] == ["limit"]
    assert "Error by layer in numbers" not in page(Report(cases=[case]))
    nothing = a_row("tinyllama", 1.0, relative=math.nan, by_layer=[], by_position={})
    assert "<svg" not in page(Report(cases=[a_case("float32", 1e-5, nothing)]))


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e-7, 1.0, 1e306])
def test_curves_of_any_size(error):
    case = a_case("float32", 1e-5, a_row("tinyllama", error))
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
        assert all(left >= 0 and right <= 460 for left, _, right, _ in chart)
        assert not any(overlap(*pair) for pair in combinations(chart, 2))


def test_every_text_can_be_read_in_light_and_in_dark(browser, tmp_path, results):
    read_in_both_schemes(browser, tmp_path, page(results))
