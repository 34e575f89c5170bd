"""The scorecard's page: what it says equals the figures, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest

from tests.pages import (
    HOSTILE,
    Read,
    leaves,
    nothing_but_the_one_style_is_allowed,
    opened,
    read_in_both_schemes,
    running_browser,
    value_at,
)
from tinyllama.lab.clauses import CLAUSES
from tinyllama.lab.continuation import Continuation
from tinyllama.lab.contract import Clause
from tinyllama.lab.figures import Cache, Card, Extent, ModelFacts, Prediction, Results, Scorecard, Unchanged
from tinyllama.lab.page import STEPS, divergence, finding, formatted, largest, moved, page, scale, step
from tinyllama.lab.speed import Speed
from tinyllama.progress import escape

LAYERS, HEADS = 4, 3


def a_contract(**examples: tuple[str, str]) -> list[Clause]:
    return [
        Clause(name, says, verdict == "declared", example, verdict)
        for name, says in CLAUSES.items()
        for verdict, example in [examples.get(name, ("kept", None))]
    ]


def a_prediction(text: str, factor: float, **other: Any) -> Prediction:
    ratio = 1 + factor / 30
    one = Prediction(
        before=20.5,
        after=20.5 * ratio,
        ratio=ratio,
        low=1 + factor / 50,
        high=1 + factor / 20,
        text=text,
        tokens=1234,
        kl_mean=factor / 7,
        kl_max=factor,
        top1=1 - factor / 100,
    )
    return replace(one, **other)


OWN = [
    Continuation("Once upon", [4, 5, 6], None, " a time\n", ""),
    Continuation("The\ncat", [4, 9], None, " a house", ""),
]
CONTINUATIONS = [
    Continuation("Once upon", [4, 5, 6], None, " a time\n", ""),
    Continuation("The\ncat", [4, 7, 8], 1, " a", " dog\n\tbarked"),
]


def a_card(name: str, factor: float, shape: tuple[int, int] = (LAYERS, HEADS), **other: Any) -> Card:
    layers, heads = shape
    values = [[factor * (7 * layer + head) / 60 for head in range(heads)] for layer in range(layers)]
    results = Results(
        speed=Speed(512, 1060.25, 4.05, 1.1936, 0.4584),
        continuations=CONTINUATIONS,
        texts=[
            a_prediction("english", factor, low=None, high=None),
            a_prediction("code", factor * 1.1),
        ],
        all=a_prediction("all", factor * 1.05, tokens=2468),
        layers_changed=[factor * layer / 9 for layer in range(layers)],
        heads_changed=values,
        heads_direct=[
            [value * (layer in (1, 2) and head != 1) for head, value in enumerate(row)]
            for layer, row in enumerate(values)
        ],
        cache=Cache(128, 0.7630208333333334, 0.25, 1234567, 0.19),
    )
    return Card(
        name=name,
        layers=[1, 2],
        heads=[head for head in range(heads) if head != 1],
        passed=True,
        contract=a_contract(cache=("declared", "T=1: a cache of 3 slots differs")),
        results=replace(results, **other),
    )


def a_leak() -> Card:
    broken = {name: ("BROKEN", f"T=2: {name} is broken") for name in ("causal", "padding")}
    return Card("leak", [1, 2], [0, 1, 2], False, a_contract(**broken))


def a_scorecard(*cards: Card, shape: tuple[int, int] = (LAYERS, HEADS), **other: Any) -> Scorecard:
    card = Scorecard(
        machine={"cpu": "a processor", "cores": 2, "gpu": None, "command": "python scripts/lab.py window"},
        model=ModelFacts(*shape, 1, "float32", ["sdpa"]),
        texts={"english": 1235, "code": 1235},
        extent=Extent(),
        unchanged=Unchanged(Speed(512, 888.25, 8.75, 1.0, 1.0), OWN),
        changes=list(cards) or [a_card("window:size=64", 2.5, shape), a_card("ablate", 9.0, shape), a_leak()],
    )
    return replace(card, **other)


def text_of(card: Scorecard) -> str:
    return " ".join(Read(page(card)).text.split())


def elements(source: str) -> list[tuple[str, Any, str]]:
    """Key, exact value and text of everything that shows a figure."""
    found = re.findall(r'class="(?:figure|text)" data-key="([^"]*)" data-value="([^"]*)">([^<]*)<', source)
    return [(key, json.loads(html.unescape(exact)), html.unescape(text)) for key, exact, text in found]


def test_every_figure_is_shown_as_it_is_and_none_is_missing():
    card = a_scorecard()
    figures, source = asdict(card), page(card)
    shown = elements(source)
    assert len(shown) > 150
    for key, exact, text in shown:
        assert exact == value_at(figures, key), key
        assert text in (escape(formatted(key, exact)), escape(formatted(key, exact), "\n\t")), key
    for key, exact in re.findall(r'data-key="([^"]*)" data-value="([^"]*)"', source):
        assert json.loads(html.unescape(exact)) == value_at(figures, key), key
    keys = set(Read(source).shown)
    # The unchanged model is not compared with itself, and where there is no example none is shown.
    told = r"unchanged\.(speed\..*_ratio|continuations\.\d\.(parts_at|rest))|changes\.2\.results"
    missing = [
        key
        for key in leaves(figures)
        if not any(key == whole or key.startswith(f"{whole}.") for whole in keys)
        and not re.fullmatch(told, key)
        and not (key.endswith(".example") and value_at(figures, key) is None)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("all.before", 28.269387, "28.27"),
        ("all.after", 1.9e10, "1.9e+10"),
        ("all.ratio", 1e9, "×1.0e+09"),
        ("all.ratio", 0.962, "-3.8%"),
        ("all.top1", 0.607421875, "60.7%"),
        ("all.kl_mean", 0.73195, "0.732"),
        ("texts.0.tokens", 10234, "10,234"),
        ("cache.needed", 0.763, "76%"),
        ("cache.needed", None, "not known"),
        ("cache.kept", 0.25, "25%"),
        ("cache.bytes", 1234567, "1.23 MB"),
        ("speed.decode", None, "no cache"),
        ("speed.decode_ratio", None, "no cache"),
        ("speed.decode_ratio", 1.4584, "1.46×"),
        ("speed.prefill", 1060.25, "1,060.2"),
        ("layers", [0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"),
        ("continuations.0.ids", [4, 5], "4, 5"),
        ("continuations.0.prompt", "a\n" + "b" * 99, "a⏎" + "b" * 57 + "…"),
        ("machine.gpu", None, "none"),
        ("texts", {"english": 1235, "code": 7}, "english 1,235, code 7"),
    ],
)
def test_how_a_figure_is_written(key, value, text):
    assert formatted(key, value) == text


@pytest.mark.parametrize(
    ("value", "as_divergence", "as_change", "colour"),
    [
        (0.0, "0.0", "0%", "s0"),
        (1e-12, "1.0e-12", "<0.1%", "s1"),
        (0.0099, "9.9e-03", "1.0%", "s1"),
        (0.49, "0.490", "49.0%", "s7"),
        (2.44, "2.440", "244.0%", "s10"),
        (123456.7, "123456.700", "1.2e+07%", "s10"),
        (math.nan, "nan", "not finite", "unknown"),
        (math.inf, "inf", "not finite", "unknown"),
    ],
)
def test_how_nats_and_relative_changes_are_written_and_coloured(value, as_divergence, as_change, colour):
    assert (divergence(value), moved(value), step(value, 1.0)) == (as_divergence, as_change, colour)


def test_the_largest_change_and_its_place():
    assert largest([[0.0, 0.2], [math.nan, 0.7]]) == "70.0% in layer 1, head 1"
    assert largest([[0.0, math.nan]]) == ""


def spoilt(value: Any, key: str = "") -> Any:
    """The same figures with hostile text in every text."""
    if isinstance(value, dict):
        return {name + HOSTILE * (key == "texts"): spoilt(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [spoilt(part) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: spoilt(part, name) for name, part in vars(value).items()})
    return value + HOSTILE if isinstance(value, str) and key != "verdict" else value


def test_text_from_outside_is_only_text():
    source = page(spoilt(a_scorecard()))
    plain, read = Read(page(a_scorecard())), Read(source)
    assert read.tags == plain.tags
    assert not {"\u202e", "\x07", "\r"} & set(source)
    assert read.text.count("<script>alert(1)</script>\"'</style>&\\u202e\\x07{{ 7 * 7 }}") > 60
    nothing_but_the_one_style_is_allowed(source)


def test_the_sections_in_their_order():
    attributes = Read(page(a_scorecard())).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert ids == ["summary", "change-2", "terms", "change-0", "change-1", "continuations", "settings"]
    targets = {value for name, value in attributes if name == "href"}
    assert targets == {"#change-0", "#change-1", "#change-2"}


def test_the_heading_says_what_was_changed_and_the_verdict():
    several = text_of(a_scorecard())
    assert "3 attentions, each beside the unchanged model window:size=64: higher perplexity, +8.7%" in several
    assert "leak: breaks the contract, so nothing was measured ✗ contract BROKEN" in several
    assert "ablate: higher perplexity, +31.5% (+18.9% to +47.3%) ✓ contract kept" in text_of(
        a_scorecard(a_card("ablate", 9.0))
    )


@pytest.mark.parametrize(
    ("ratio", "low", "high", "says"),
    [
        (1.02, 0.99, 1.05, "perplexity as before, as far as these texts tell (+2.0% (-1.0% to +5.0%))"),
        (0.98, 0.97, 0.99, "lower perplexity, -2.0% (-3.0% to -1.0%)"),
        (1.5, 1.4, 1.6, "higher perplexity, +50.0% (+40.0% to +60.0%)"),
        (2.03, 1.9, 2.2, "perplexity doubled, +103% (+90.0% to +120%)"),
        (4.81, 3.6, 6.48, "perplexity 4.8 times as high, +381% (+260% to +548%)"),
        (1401.0, None, None, "perplexity 1,401 times as high, ×1,401"),
    ],
)
def test_a_finding_in_words(ratio, low, high, says):
    results = a_card("x", 1.0).results
    assert finding(replace(results, all=a_prediction("all", 1.0, ratio=ratio, low=low, high=high))) == says


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([0.0], 1.0),
        ([0.003, 0.0], 0.005),
        ([0.1], 0.1),
        ([0.11], 0.2),
        ([0.7, 3.2, math.inf], 5.0),
        ([730.0], 1000.0),
    ],
)
def test_the_colours_cover_what_is_there(values, top):
    assert scale([[0.0], values]) == top
    assert step(top, top) == f"s{STEPS}"


def test_a_broken_contract_has_its_examples_and_nothing_else():
    source = page(a_scorecard())
    examples, others = source.split('<article class="broken"')[1].split("</article>")[0].split("<details>")
    assert all(f"T=2: {name} is broken" in examples for name in ("causal", "padding"))
    assert "T=2" not in others
    row = source.split('<th scope="row"><a href="#change-2">')[1].split("</tr>")[0]
    assert "it breaks causal, padding" in row
    columns = source.split("<thead>")[1].split("</thead>")[0].count("<th ")
    assert f'colspan="{columns - 3}"' in row


def test_without_timing_there_is_no_speed():
    measured = a_card("window", 2.5, speed=None)
    source = page(a_scorecard(measured, unchanged=Unchanged(None, OWN)))
    head = source.split("<thead>")[1].split("</thead>")[0]
    assert "prefill" not in head
    assert "Tokens a second" not in re.sub(r"<dl>.*?</dl>", "", source, flags=re.DOTALL)
    row = source.split('<th scope="row"><a href="#change-0">')[1].split("</tr>")[0]
    assert row.count("<td") == head.count("<th ") - 1


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"speed": Speed(512, 1060.25, None, 1.2, None)}, "no cache"),
        ({"cache": Cache(128, None, 1.0, 1000, 1.0)}, "not known"),
        ({"all": a_prediction("all", 1.0, low=None, high=None)}, "texts too short for an interval"),
        ({"all": a_prediction("all", 1.0, ratio=1e9)}, "×1.0e+09"),
        ({"all": a_prediction("all", 1.0, ratio=math.inf)}, "×inf"),
        ({"all": a_prediction("all", 1.0, kl_mean=math.nan)}, "nan"),
        ({"heads_direct": [[0.0] * HEADS] * LAYERS}, "nothing moved"),
    ],
)
def test_a_missing_or_extreme_figure_is_told(other, says):
    assert says in text_of(a_scorecard(a_card("window", 2.5, **other)))
    assert says not in text_of(a_scorecard(a_card("window", 2.5)))


def test_only_a_broken_shape_leaves_clauses_unchecked():
    leak = replace(a_leak(), contract=a_contract(shape=("BROKEN", "oops"))[:1])
    assert "no other clause was checked" in text_of(a_scorecard(leak))
    assert "no other clause was checked" not in text_of(a_scorecard())


def test_one_text_has_no_sum():
    alone = a_card("window", 2.5, texts=[a_prediction("english", 2.5)])
    sums = [
        len(re.findall(r"\.all\.text", page(a_scorecard(card)))) for card in (a_card("window", 2.5), alone)
    ]
    assert sums == [1, 0]


def test_without_a_measured_change_the_unchanged_model_is_shown():
    read = Read(page(a_scorecard(a_leak(), unchanged=Unchanged(None, OWN))))
    assert "rect" not in read.tags
    assert {"unchanged.continuations.1.same", "unchanged.continuations.1.ids"} <= set(read.shown)
    assert "Continuations" not in page(a_scorecard(a_leak(), unchanged=Unchanged(None, [])))


def texts(source: str) -> list[str]:
    """The continuations, without tags."""
    found = re.findall(r'<p class="prose"[^>]*>(.*?)</p>', source, re.DOTALL)
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in found]


def test_continuations_stand_side_by_side():
    card = a_scorecard()
    assert texts(page(card))[:3] == [" a time\n", " a▸ house", " a▸ dog\n\tbarked"]
    text = text_of(card)
    assert "the same 3 tokens" in text
    assert "1 token the same, then id 7, not id 9" in text
    assert "1 token,in 1 of 2" in text
    assert "The⏎cat" in text


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (CONTINUATIONS[0], Continuation("The\ncat", [4], 1, " a", ""), "then the end, not id 9"),
        (
            Continuation("Once upon", [4, 5, 6, 7], 3, " a time\n", "x"),
            CONTINUATIONS[1],
            "3 tokens the same, then id 7, not the end",
        ),
        (Continuation("Once upon", [4, 5, 7], 2, " a", " t"), CONTINUATIONS[1], "1 token,in 2 of 2"),
        (CONTINUATIONS[0], Continuation("The\ncat", [4, 9], None, " a house", ""), "never"),
    ],
)
def test_where_continuations_part(one, other, says):
    assert says in text_of(a_scorecard(a_card("window", 2.5, continuations=[one, other])))


@pytest.mark.parametrize("shape", [(4, 8), (30, 9), (22, 32)])
def test_a_map_has_every_head_of_every_layer_once_and_bars_every_layer(shape):
    card = a_card("window", 2.5, shape)
    source = page(a_scorecard(card, shape=shape))
    figures, results = asdict(card), card.results
    found = re.findall(
        r'data-key="changes\.0\.([^"]*)" data-value="([^"]*)" class="shade (\w+)( without)?" title="([^"]*)"',
        source,
    )
    assert len({key for key, *_ in found}) == len(found) == 2 * shape[0] * shape[1]
    for key, exact, colour, without, title in found:
        *_, layer, head = key.split(".")
        value = value_at(figures, key)
        assert json.loads(exact) == value
        assert colour == step(value, scale(results.heads_direct + results.heads_changed))
        assert bool(without) == (layer not in ("1", "2") or head == "1")
        assert title.startswith(f"layer {layer}, head {head}" + (", without the kernel" if without else ""))
        assert html.unescape(title).endswith(f": {moved(value)} ({value!r})")
    widths = [float(width) for width in re.findall(r'<rect width="([^"]*)"', source)]
    assert widths == [round(value / scale([results.layers_changed]), 4) for value in results.layers_changed]
    assert largest(results.heads_direct).endswith(f"in layer 2, head {shape[1] - 1}")
    assert source.count(html.escape(largest(results.heads_direct))) == 2  # for eyes, and for a screen reader


def test_tables_say_what_they_are():
    source = page(a_scorecard())
    tables = re.findall(
        r'(<div class="scroll" tabindex="0" role="region" aria-label="[^"]+">)?\s*<table', source
    )
    assert len(tables) > 8
    assert all(tables)
    assert all("scope=" in tag for tag in re.findall("<th[ >][^>]*", source))
    assert all('aria-hidden="true"' in tag for tag in re.findall("<svg [^>]*>", source))


# --- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with running_browser() as running:
        yield running


@pytest.mark.parametrize(("shape", "width"), [((4, 8), 390), ((30, 9), 1280), ((22, 32), 390)])
def test_the_page_fits_and_hostile_text_is_inert(browser, tmp_path, shape, width):
    card = spoilt(a_scorecard(a_card("a-long-name-without-a-space-" * 9, 9.0, shape), a_leak(), shape=shape))
    card = replace(card, texts={"z" * 300: 9}, machine={"command": "python " + "w" * 900})
    with opened(browser, tmp_path, page(card), width, 844) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        right = tab.evaluate(
            "[...document.querySelectorAll('main *:not(.scroll *):not(svg *)')]"
            ".map(part => part.getBoundingClientRect().right)"
        )
        assert max(right) <= width
        assert len(tab.query_selector_all("script, img, iframe")) == 0
        sizes = tab.evaluate(
            "[...document.querySelectorAll('td.shade')].map(one => one.getBoundingClientRect())"
            ".map(box => [box.width, box.height])"
        )
    assert len(sizes) == 2 * shape[0] * shape[1]
    assert all(8 <= side <= 24 for size in sizes for side in size)


def test_the_browser_has_the_figures(browser, tmp_path):
    source = page(a_scorecard())
    with opened(browser, tmp_path, source) as tab:
        cells = tab.evaluate(
            "[...document.querySelectorAll('.figure[data-key], .text[data-key]')]"
            ".filter(cell => !cell.children.length && !cell.closest('.map'))"
            ".map(cell => [cell.dataset.key, cell.dataset.value, cell.textContent])"
        )
        lines = tab.evaluate("[...document.querySelectorAll('.prose')].map(text => text.innerText)")
    assert " a▸ dog\n\tbarked" in lines
    assert [(key, json.loads(exact), text) for key, exact, text in cells] == elements(source)


def test_colours_are_in_order_in_light_and_in_dark(browser, tmp_path):
    ways = []
    for scheme in ("light", "dark"):
        with opened(browser, tmp_path, page(a_scorecard()), scheme=scheme) as tab:
            fills = tab.evaluate(
                "[...document.querySelectorAll('.legend .shade:not(.without)')]"
                ".map(one => getComputedStyle(one).backgroundColor)"
            )
        lightness = [float(re.findall(r"[\d.]+", fill)[0]) for fill in fills[: STEPS + 1]]
        changes = [after - before for before, after in pairwise(lightness)]
        assert all(abs(change) > 0.01 for change in changes)
        assert len({change > 0 for change in changes}) == 1
        assert abs(lightness[-1] - lightness[0]) > 0.6
        ways.append(lightness[-1] > lightness[0])
    assert ways == [False, True]


def test_every_text_can_be_read_in_light_and_in_dark(browser, tmp_path):
    read_in_both_schemes(browser, tmp_path, page(a_scorecard()))
