"""The scorecard's page: what it says equals the figures, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import math
import re
from itertools import combinations, pairwise
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
from tinyllama.lab.clauses import CLAUSES
from tinyllama.lab.maps import BAR, BOTTOM, LEFT, SMALL, STEPS, TOP, head_map, layer_bars, moved, step
from tinyllama.lab.page import divergence, formatted, page
from tinyllama.progress import escape

LAYERS, HEADS = 4, 3
# (layers, heads): of the smallest model that is tried, and of the two that come with the project.
SHAPES = [(4, 8), (30, 9), (22, 32)]


def a_contract(**examples: tuple[str, str]) -> list[dict[str, Any]]:
    clauses = []
    for name, says in CLAUSES.items():
        verdict, example = examples.get(name, ("kept", None))
        clauses.append({"clause": name, "verdict": verdict, "says": says, "example": example})
    return clauses


def a_prediction(factor: float, **other: Any) -> dict[str, Any]:
    low, high = {"low": 1 + factor / 50, "high": 1 + factor / 20}, {"kl_mean": factor / 7, "kl_max": factor}
    ratio = 1 + factor / 30
    return {"tokens": 1234, "before": 20.5, "after": 20.5 * ratio, "ratio": ratio, **low, **high} | {
        "top1": 1 - factor / 100,
        **other,
    }


def a_text(same: str, rest: str, ids: list[int], parts_at: int | None) -> dict[str, Any]:
    return {"prompt": "Once upon", "ids": ids, "parts_at": parts_at, "same": same, "rest": rest}


def a_change(
    name: str, factor: float, shape: tuple[int, int] = (LAYERS, HEADS), **other: Any
) -> dict[str, Any]:
    layers, heads = shape
    values = [[factor * (7 * layer + head) / 60 for head in range(heads)] for layer in range(layers)]
    direct = [[value * (layer in (1, 2) and head != 1) for head, value in enumerate(row)]
              for layer, row in enumerate(values)]  # fmt: skip
    card = {
        "name": name,
        "layers": [1, 2],
        "heads": [head for head in range(heads) if head != 1],
        "passed": True,
        "contract": a_contract(cache=("declared", "T=1: a cache of 3 slots differs")),
        "texts": [
            {"text": "english"} | a_prediction(factor, low=None, high=None),
            {"text": "code"} | a_prediction(factor * 1.1),
        ],
        "all": a_prediction(factor * 1.05, tokens=2468),
        "layers_changed": [factor * layer / 9 for layer in range(layers)],
        "heads_changed": values,
        "heads_direct": direct,
        "keys": {"of": 128, "needed": 0.7630208333333334},
        "speed": {"context": 512, "prefill": 1060.25, "decode": 4.05}
        | {"prefill_ratio": 1.1936, "decode_ratio": 0.4584},
        "continuations": [
            a_text(" a time\n", "", [4, 5, 6], None),
            a_text(" a", " dog\n\tbarked", [4, 7, 8], 1) | {"prompt": "The\ncat"},
        ],
    }
    return card | other


def a_leak() -> dict[str, Any]:
    broken = {name: ("BROKEN", f"T=2: {name} is broken") for name in ("causal", "padding")}
    return {"name": "leak", "layers": [1, 2], "heads": [0, 1, 2], "passed": False,
            "contract": a_contract(**broken)}  # fmt: skip


def some_figures(shape: tuple[int, int] = (LAYERS, HEADS)) -> dict[str, Any]:
    own = [a_text(" a time\n", "", [4, 5, 6], None), a_text(" a house", "", [4, 9], None)]
    own[1]["prompt"] = "The\ncat"
    return {
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "command": "python scripts/lab.py window"},
        "model": {
            "layers": shape[0],
            "heads": shape[1],
            "kv_heads": 1,
            "dtype": "float32",
            "kernels": ["sdpa"],
        },
        "texts": {"english": 1235, "code": 1235},
        "extent": {"context": 512, "rounds": 3, "new_tokens": 32},
        "unchanged": {
            "speed": {"context": 512, "prefill": 888.25, "decode": 8.75}
            | {"prefill_ratio": 1.0, "decode_ratio": 1.0},
            "continuations": own,
        },
        "changes": [a_change("window:size=64", 2.5, shape), a_change("ablate", 9.0, shape), a_leak()],
    }


def elements(source: str) -> list[tuple[str, Any, str]]:
    """Key, exact value and text of everything that shows a figure."""
    found = re.findall(r'class="(?:figure|text)" data-key="([^"]*)" data-value="([^"]*)">([^<]*)<', source)
    return [(key, json.loads(html.unescape(exact)), html.unescape(text)) for key, exact, text in found]


def test_every_figure_is_shown_as_it_is():
    figures = some_figures()
    source = page(figures)
    shown = elements(source)
    assert len(shown) > 150
    for key, exact, text in shown:
        assert exact == value_at(figures, key), key
        assert text in (escape(formatted(key, exact)), escape(formatted(key, exact), "\n\t")), key
    for key, exact in re.findall(r'data-key="([^"]*)" data-value="([^"]*)"', source):
        assert json.loads(html.unescape(exact)) == value_at(figures, key), key


def test_no_figure_is_missing():
    """But for the unchanged model beside itself, and for the examples that there are not."""
    figures = some_figures()
    shown = set(Read(page(figures)).shown)
    told = r"unchanged\.(speed\..*_ratio|continuations\.\d\.(parts_at|rest))"
    missing = [
        key
        for key in leaves(figures)
        if not any(key == whole or key.startswith(f"{whole}.") for whole in shown)
        and not re.fullmatch(told, key)
        and not (key.endswith(".example") and value_at(figures, key) is None)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("changes.0.all.before", 28.269387, "28.27"),
        ("changes.0.all.after", 1.9e10, "1.9e+10"),
        ("changes.0.all.ratio", 1e9, "×1.0e+09"),
        ("changes.0.all.ratio", 0.962, "-3.8%"),
        ("changes.0.all.top1", 0.607421875, "60.7%"),
        ("changes.0.all.kl_mean", 0.73195, "0.732"),
        ("changes.0.texts.0.tokens", 10234, "10,234"),
        ("changes.0.keys.needed", 0.763, "76%"),
        ("changes.0.keys.needed", None, "no gradient"),
        ("changes.0.speed.decode", None, "no cache"),
        ("changes.0.speed.decode_ratio", None, "no cache"),
        ("changes.0.speed.decode_ratio", 1.4584, "1.46×"),
        ("changes.0.speed.prefill", 1060.25, "1,060.2"),
        ("changes.0.layers", [0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"),
        ("changes.0.continuations.0.ids", [4, 5], "4, 5"),
        ("changes.0.continuations.0.prompt", "a\n" + "b" * 99, "a⏎" + "b" * 57 + "…"),
        ("machine.gpu", None, "none"),
        ("texts", {"english": 1235, "code": 7}, "english 1,235, code 7"),
    ],
)
def test_how_a_figure_is_written(key, value, text):
    assert formatted(key, value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0"), (2.44, "2.440"), (0.0099, "9.9e-03")])
def test_how_a_divergence_is_written(value, text):
    assert divergence(value) == text


def test_text_from_outside_is_only_text():
    def spoilt(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name + HOSTILE * (key == "texts"): spoilt(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [spoilt(part) for part in value]
        return value + HOSTILE if isinstance(value, str) and key != "verdict" else value

    source = page(spoilt(some_figures()))
    plain, read = Read(page(some_figures())), Read(source)
    assert read.tags == plain.tags
    assert not {"\u202e", "\x07", "\r"} & set(source)
    assert read.text.count("<script>alert(1)</script>\"'</style>&\\u202e\\x07{{ 7 * 7 }}") > 60


def test_nothing_but_the_one_style_is_allowed():
    nothing_but_the_one_style_is_allowed(page(some_figures()))


def test_the_sections_in_their_order():
    ids = [value for name, value in Read(page(some_figures())).attributes if name == "id"]
    assert ids == ["summary", "change-2", "terms", "change-0", "change-1", "continuations", "settings"]
    targets = {value for name, value in Read(page(some_figures())).attributes if name == "href"}
    assert targets == {"#change-0", "#change-1", "#change-2"}


def test_the_heading_says_what_was_tried_and_the_verdict():
    figures = some_figures()
    assert "✗ contract BROKEN" in page(figures)
    figures["changes"][0]["layers"], figures["changes"][0]["heads"] = [0, 1, 2, 3], [0, 1, 2]
    figures["changes"][1]["layers"] = [3]
    text = " ".join(Read(page(figures)).text.split())
    assert "window:size=64 in all 4 layers, all 3 heads; ablate in layer 3, heads 0, 2;" in text
    del figures["changes"][2]
    assert "✓ contract kept" in page(figures)


def test_a_broken_contract_has_its_examples_and_nothing_else():
    source = page(some_figures())
    block = source[source.index('<article class="broken"') :].split("</article>")[0]
    assert "Nothing else was measured" in block
    examples = block.split("<details>")[0]
    assert all(f"T=2: {name} is broken" in examples for name in ("causal", "padding"))
    assert len(re.findall("T=2", block)) == 4  # each as an attribute, too
    assert "no other clause was tried" not in block
    row = source.split('<tr><th scope="row"><a href="#change-2">')[1].split("</tr>")[0]
    assert "not measured: it breaks causal, padding" in row
    columns = source.split("<thead>")[1].split("</thead>")[0].count("<th ")
    assert row.count("<td ") == 3
    assert f'colspan="{columns - 3}"' in row


def some_figures_but(path: str, name: str, value: Any) -> dict[str, Any]:
    """Some figures, with another value in one place."""
    figures = some_figures()
    value_at(figures, path)[name] = value
    return figures


def test_without_timing():
    figures = some_figures()
    for card in (figures["unchanged"], *figures["changes"][:2]):
        del card["speed"]
    source = page(figures)
    head = source.split("<thead>")[1].split("</thead>")[0]
    assert "prefill" not in head
    assert "Tokens a second" not in re.sub(r"<dl>.*?</dl>", "", source, flags=re.DOTALL)
    row = source.split('<a href="#change-0">')[1].split("</tr>")[0]
    assert row.count("<td") == head.count("<th ") - 1


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("changes.0.speed", "decode_ratio"), None, "no cache"),
        (("changes.0.keys", "needed"), None, "no gradient"),
        (("changes.0.all", "low"), None, "texts too short for an interval"),
        (("changes.0.all", "ratio"), 1e9, "×1.0e+09"),
        (("changes.0.all", "ratio"), 0.9, "-10.0%"),
        (("changes.0.all", "ratio"), math.inf, "×inf"),
        (("changes.0.all", "kl_mean"), math.nan, "nan"),
        (("changes.0", "contract"), a_contract(), "gives (B, H, T, D)"),
        (("changes.2", "contract"), a_contract(shape=("BROKEN", "oops"))[:1], "no other clause was tried"),
    ],
)
def test_what_may_be_missing_or_extreme(path, value, says):
    figures = some_figures_but(*path, value)
    assert says in Read(page(figures)).text
    assert says not in Read(page(some_figures())).text or says.startswith("gives")


def test_one_text_has_no_sum():
    figures = some_figures()
    del figures["changes"][0]["texts"][1], figures["changes"][1]["texts"][1]
    assert "<strong>all</strong>" in page(some_figures())
    assert "<strong>all</strong>" not in page(figures)


def test_no_sound_change():
    figures = some_figures()
    figures["changes"] = [a_leak()]
    del figures["unchanged"]["speed"]
    read = Read(page(figures))
    assert "rect" not in read.tags
    assert {"unchanged.continuations.1.same", "unchanged.continuations.1.ids"} <= set(read.shown)


def test_no_change_and_no_prompt():
    figures = some_figures()
    figures["changes"], figures["unchanged"]["continuations"] = [], []
    assert "Continuations" not in page(figures)


def texts(source: str) -> list[str]:
    """The continuations, without tags."""
    found = re.findall(r'<p class="prose"[^>]*>(.*?)</p>', source, re.DOTALL)
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in found]


def test_continuations_side_by_side():
    figures = some_figures()
    source = page(figures)
    assert texts(source)[:3] == [" a time\n", " a▸ house", " a▸ dog\n\tbarked"]
    read = " ".join(Read(source).text.split())
    assert "the same 3 tokens" in read
    assert "1 token the same, then id 7, not id 9" in read
    assert "1 token,in 1 of 2" in read
    figures["changes"][0]["continuations"][0] |= {"ids": [4, 5, 7], "parts_at": 2}
    assert "1 token,in 2 of 2" in " ".join(Read(page(figures)).text.split())
    assert "The⏎cat" in read


def test_a_continuation_that_ends_first():
    figures = some_figures()
    figures["changes"][0]["continuations"][1] = a_text(" a", "", [4], 1)
    read = " ".join(Read(page(figures)).text.split())
    assert "then the end, not id 9" in read
    figures["changes"][0]["continuations"][0] |= {"ids": [4, 5, 6, 7], "parts_at": 3, "rest": "x"}
    assert "3 tokens the same, then id 7, not the end" in " ".join(Read(page(figures)).text.split())


def test_texts_that_never_part():
    figures = some_figures()
    for card in figures["changes"][:2]:
        card["continuations"][1] |= {"parts_at": None, "same": " a house", "rest": "", "ids": [4, 9]}
    assert "never" in Read(page(figures)).text
    assert all("▸" not in text for text in texts(page(figures)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["heads_direct", "heads_changed"])
def test_a_map_has_every_head_of_every_layer_once(shape, name):
    card = a_change("window", 2.5, shape)
    drawing = head_map("A map", name, card[name], set(card["layers"]), set(card["heads"]))
    marks = {mark.key: mark for mark in drawing.marks}
    assert len(marks) == len(drawing.marks) == shape[0] * shape[1]
    corners = set()
    for layer in range(shape[0]):
        for head in range(shape[1]):
            mark, value = marks[f"{name}.{layer}.{head}"], card[name][layer][head]
            put = layer in (1, 2) and head != 1
            place = f"layer {layer}, head {head}" + ("" if put else ", without the kernel")
            assert mark.title == f"{place}: {moved(value)} ({value!r})"
            assert mark.kind.split() == [step(value)] + ["without"] * (not put)
            corners.add((round(mark.x + mark.width / 2, 1), round(mark.y + mark.height / 2, 1)))
            assert LEFT <= mark.x < mark.x + mark.width <= drawing.width
            assert TOP <= mark.y < mark.y + mark.height <= drawing.height - BOTTOM
    assert len(corners) == len(marks)
    big, small = marks[f"{name}.1.0"], marks[f"{name}.1.1"]
    assert small.width < (SMALL + 0.1) * big.width
    assert big.x < small.x < marks[f"{name}.1.2"].x
    assert big.y < marks[f"{name}.2.0"].y
    assert [label.text for label in drawing.rows] == [str(layer) for layer in range(shape[0])]
    assert drawing.columns[0].text == "0"
    for label, layer in ((drawing.rows[0], 0), (drawing.rows[-1], shape[0] - 1)):
        mark = marks[f"{name}.{layer}.0"]
        assert mark.y < label.y < mark.y + mark.height + 3
    assert drawing.largest.endswith(
        f"in layer {2 if name == 'heads_direct' else shape[0] - 1}, head {shape[1] - 1}"
    )


def test_the_marks_on_the_page_are_those_of_the_figures():
    figures = some_figures()
    found = re.findall(
        r'<rect class="([^"]*)"[^>]* data-key="([^"]*)" data-value="([^"]*)"><title>([^<]*)</title>',
        page(figures),
    )
    assert len(found) == 2 * (2 * LAYERS * HEADS + LAYERS)
    for kind, key, exact, title in found:
        value = value_at(figures, key)
        assert json.loads(exact) == value
        assert title.endswith(f" ({value!r})")
        assert kind.split()[0] == ("bar" if "layers_changed" in key else step(value))


@pytest.mark.parametrize("shape", SHAPES)
def test_bars_are_as_long_as_the_change_and_end_at_100_percent(shape):
    values = [0.0, 0.0004, 0.5, *[1.7] * (shape[0] - 3)]
    bars = layer_bars("Bars", "layers_changed", values, {2})
    assert [mark.width for mark in bars.marks[:4]] == [0, round(BAR * 0.0004, 2), BAR / 2, BAR]
    assert [label.text for label in bars.numbers[:4]] == ["0%", "<0.1%", "50.0%", "170.0%"]
    assert bars.marks[1].height < bars.marks[2].height
    assert [mark.key for mark in bars.marks] == [f"layers_changed.{layer}" for layer in range(shape[0])]
    assert "without the kernel" in bars.marks[1].title
    assert "without the kernel" not in bars.marks[2].title
    assert bars.largest == "170.0% in layer 3"


def test_maps_and_bars_have_the_same_rows():
    card = a_change("window", 2.5, (22, 32))
    one = head_map("A map", "heads_direct", card["heads_direct"], {1, 2}, {0})
    bars = layer_bars("Bars", "layers_changed", card["layers_changed"], {1, 2})
    assert one.rows == bars.rows
    assert one.height == bars.height


def test_the_colour_follows_the_value():
    values = [0.0, 1e-12, *(n / 1000 for n in range(1, 1000)), 1.0, 1.5, 9e9]
    steps = [int(step(value)[1:]) for value in values]
    assert steps == sorted(steps)
    assert set(steps) == set(range(STEPS + 1))
    assert (steps[0], steps[1], step(0.5), step(1.0), step(8.3)) == (0, 1, "s10", "s20", "s20")
    assert step(math.nan) == step(math.inf) == "unknown"
    assert moved(math.nan) == moved(math.inf) == "not finite"


def test_nothing_moved():
    assert head_map("A map", "heads_direct", [[0.0, math.nan]], {0}, {0, 1}).largest == ""
    figures = some_figures_but("changes.0", "heads_direct", [[0.0] * HEADS] * LAYERS)
    says = "By itself: change of each head's output if the kernel replaces it alone. Nothing moved."
    assert says in html.unescape(page(figures))


def test_pictures_and_tables_say_what_they_are():
    source = page(some_figures())
    for tag in re.findall("<svg [^>]*>", source):
        assert 'aria-hidden="true"' in tag or re.search('role="img" aria-label="[^"]{20,}"', tag)
    tables = re.findall(
        r'(<div class="scroll" tabindex="0" role="region" aria-label="[^"]+">)?\s*<table', source
    )
    assert len(tables) > 8
    assert all(tables)
    assert all("scope=" in tag for tag in re.findall("<th[ >][^>]*", source))


@pytest.fixture(scope="module")
def browser():
    with running_browser() as running:
        yield running


def awkward(shape: tuple[int, int]) -> dict[str, Any]:
    """Figures with long and hostile names."""
    figures = some_figures(shape)
    figures["changes"][0]["name"] = f"/a/folder{HOSTILE}\n.py:window"
    figures["changes"][1]["name"] = "a-long-name-without-a-space-" * 9
    figures["changes"][1]["layers"] = list(range(0, shape[0], 2))
    figures["changes"][1]["continuations"][1]["prompt"] = HOSTILE * 3
    figures["changes"][1]["continuations"][1]["rest"] = "x" * 900 + HOSTILE
    figures["changes"][1]["all"] |= {"after": 1.9e10, "ratio": 1e9, "low": 1e8, "high": 1e11}
    figures["changes"][2]["contract"] = a_contract(causal=("BROKEN", HOSTILE + "y" * 900))
    figures["changes"][1]["layers_changed"][1] = 123456.7
    figures["texts"] = {HOSTILE: 3, "z" * 300: 9}
    figures["machine"]["command"] = "python " + "w" * 900
    return figures


LABELS = """
[...document.querySelectorAll('figure svg, .legend svg[role]')].map(svg => ({
  size: [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height],
  texts: [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBBox(); return [box.x, box.y, box.x + box.width, box.y + box.height] }),
}))
"""


@pytest.mark.parametrize(("shape", "width"), [*zip(SHAPES, (390, 1280, 390), strict=True)])
def test_the_page_fits_and_hostile_text_is_inert(browser, tmp_path, shape, width):
    with opened(browser, tmp_path, page(awkward(shape)), width, 844) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        right = tab.evaluate(
            "[...document.querySelectorAll('main *:not(.scroll *):not(svg *)')]"
            ".map(part => part.getBoundingClientRect().right)"
        )
        assert max(right) <= width
        assert len(tab.query_selector_all("script, img, iframe")) == 0
        drawings = tab.evaluate(LABELS)
        marks = len(tab.query_selector_all("rect[data-key]"))
    assert marks == 2 * (2 * shape[0] * shape[1] + shape[0])
    assert len(drawings) == 2 * 4
    for drawing in drawings:
        wide, high = drawing["size"]
        boxes = drawing["texts"]
        assert all(x >= 0 and y >= 0 and end <= wide and low <= high for x, y, end, low in boxes)
        # Rows are lower than a line of text with its leading.
        inked = [[x, y + 2, end, low - 2] for x, y, end, low in boxes]
        assert not any(overlap(*pair) for pair in combinations(inked, 2))


def test_the_browser_has_the_figures(browser, tmp_path):
    figures = some_figures()
    with opened(browser, tmp_path, page(figures)) as tab:
        cells = tab.evaluate(
            "[...document.querySelectorAll('.figure[data-key], .text[data-key]')]"
            ".filter(cell => !cell.children.length)"
            ".map(cell => [cell.dataset.key, cell.dataset.value, cell.textContent])"
        )
        lines = tab.evaluate("[...document.querySelectorAll('.prose')].map(text => text.innerText)")
    assert " a▸ dog\n\tbarked" in lines
    assert [(key, json.loads(exact), text) for key, exact, text in cells] == elements(page(figures))


def test_colours_are_in_order_in_light_and_in_dark(browser, tmp_path):
    ways = []
    for scheme in ("light", "dark"):
        with opened(browser, tmp_path, page(some_figures()), scheme=scheme) as tab:
            fills = tab.evaluate(
                "Object.fromEntries([...document.querySelectorAll('rect')]"
                ".map(rect => [rect.classList[0], getComputedStyle(rect).fill]))"
            )
        lightness = [float(re.findall(r"[\d.]+", fills[f"s{n}"])[0]) for n in range(STEPS + 1)]
        changes = [after - before for before, after in pairwise(lightness)]
        assert all(abs(change) > 0.01 for change in changes)
        assert len({change > 0 for change in changes}) == 1
        assert abs(lightness[-1] - lightness[0]) > 0.6
        ways.append(lightness[-1] > lightness[0])
    assert ways == [False, True]


def test_every_text_can_be_read_in_light_and_in_dark(browser, tmp_path):
    read_in_both_schemes(browser, tmp_path, page(some_figures()))
