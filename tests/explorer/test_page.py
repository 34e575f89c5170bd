"""The page in a real browser: the model's figures, the lines that ran, the forks that were asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tinyllama
from tests.explorer.serving import SECRET, served
from tests.pages import opened, running_browser
from tests.scripts.test_scripts import write_checkpoint
from tinyllama.attention import eager
from tinyllama.explorer.page import answers
from tinyllama.explorer.page import page as whole_page
from tinyllama.explorer.session import Session
from tinyllama.lab.kernel_file import BUILT_IN

TEXT = "The capital of France is Paris, and the capital of Germany is"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; \u202e\x07 {{ 7*7 }}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def session(smollm2_folder: Path) -> Session:
    model, tokenizer = tinyllama.load(str(smollm2_folder), device="cpu", dtype="float32", weights="exact")
    return Session(model, tokenizer, tokenizer.encode(TEXT), "smollm2", BUILT_IN)


@pytest.fixture(scope="module")
def port(session: Session) -> Iterator[int]:
    with served(session) as port:
        yield port


@contextmanager
def tab(browser: Any, port: int, place: str = "", refused: int = 0, **context: Any) -> Iterator[Any]:
    """The page, from the server; a complaint of the browser or a request elsewhere fails the test."""
    opened = browser.new_context(**{"viewport": {"width": 1300, "height": 1000}, **context})
    tab = opened.new_page()
    complaints: list[str] = []
    hosts: set[str] = set()
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    tab.goto(f"http://127.0.0.1:{port}/{SECRET}/{place}")
    tab.wait_for_selector("#tokens button")
    yield tab
    opened.close()
    assert [one for one in complaints if "status of 400" not in one] == []
    assert len(complaints) == refused
    assert hosts == {f"127.0.0.1:{port}"}


# Two frames later; a browser that takes the page for hidden draws none, and nothing else would end the wait.
DRAWN = """new Promise((done) => {
    requestAnimationFrame(() => requestAnimationFrame(done));
    setTimeout(done, 1000);
})"""


def settle(page: Any) -> None:
    """Wait until nothing is asked for and drawn any more."""
    for _ in range(3):
        until(page, "pending === 0")
        page.evaluate(DRAWN)


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; the page's policy forbids Playwright's own way, which is eval."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(condition)


def near(shown: str, exact: float) -> bool:
    """Whether a number with three digits is that number."""
    return abs(float(shown) - exact) <= 0.006 * abs(exact) + 1e-12


@torch.no_grad()
def test_thirty_selections_show_what_capture_gives(browser, session, port):
    model, ids = session.model, session.branches[0].recording.ids
    model.set_attention(eager)
    with tinyllama.capture(model, "layers.*", "layers.*.*", "layers.*.*.*") as seen:
        model(torch.tensor([ids]))
    seen, draw, checked = dict(seen), random.Random(0), 0
    ask = """([token, layer, head, step]) => new Promise((done, fail) => {
        select({ token, layer, head, key: 0, step });
        const end = Date.now() + 10000;
        const wait = () => {
            if (Date.now() > end) return fail(new Error(`step ${step} of layer ${layer} shows no values`));
            const rows = [...document.querySelectorAll("[data-weight]")];
            const values = [...document.querySelectorAll("#source .value")];
            const filled = values.every((one) => one.querySelector(".stats").textContent);
            const place = `${token} ${layer} ${head}`;
            const drawn = [$("code"), $("attention")].every((one) => one.dataset.drawn === place);
            if (!values.length || !filled || !drawn) return setTimeout(wait, 10);
            const name = (one) => one.dataset.value.split("/")[2];
            done([rows.map((one) => [one.dataset.weight, one.dataset.exact]),
                  values.map((one) => [name(one), one.querySelector(".stats").textContent])]);
        };
        wait();
    })"""
    with tab(browser, port) as page:
        settle(page)
        steps = page.evaluate("code.steps.length"), page.evaluate("code.entered")
        first = page.evaluate("code.entered[15] + 1")
        assert first < steps[0]
        page.evaluate("document.querySelector('#attention').scrollIntoView()")
        for _ in range(30):
            token, layer, head = draw.randrange(len(ids)), draw.randrange(30), draw.randrange(9)
            step = steps[1][layer] + 1 + draw.choice([0, 4, 13, 36, 37, 41])  # statements that bind values
            weights, values = page.evaluate(ask, [token, layer, head, step])
            pattern = seen[f"layers.{layer}.self_attn.pattern"][0, head, token]
            assert weights
            assert all(float(exact) == pattern[int(key)].item() for key, exact in weights)
            names = [at for at in seen if at.startswith(f"layers.{layer}.")]
            for name, stats in values:
                found = [seen[at] for at in names if at.endswith(f".{name}")]
                if found:
                    _, mean, _, rms, least, _, most = stats.split()
                    x = found[0].double()
                    exact = [one.item() for one in (x.mean(), x.square().mean().sqrt(), x.min(), x.max())]
                    assert all(map(near, (mean, rms, least, most), exact)), (name, stats)
                    checked += 1
    assert checked > 100


def test_stepping_by_keyboard_visits_the_lines_that_ran_in_order(browser, session, port):
    with tab(browser, port, "#token=3&layer=2") as page:
        page.wait_for_selector("#source .now")
        settle(page)
        code = session.view("code", {"branch": 0, "token": 0, "layer": 2})
        page.focus("#source")
        page.evaluate("go(0)")
        for step in code["steps"][:45]:
            assert int(page.get_attribute("#source .now", "data-line")) == step["line"]
            source = page.inner_text("#source .now .s")
            call = code["calls"][step["call"]]
            assert source.strip() == call["lines"][step["line"] - call["first"]].strip()
            page.keyboard.press("ArrowRight")
        page.evaluate(f"go({code['entered'][2] + 1})")
        page.keyboard.press("ArrowUp")  # out of the block, behind its line
        assert page.inner_text("#where").startswith("Llama.hidden_states in")
        at = page.evaluate("at.step")
        page.keyboard.press("n")
        page.keyboard.press("ArrowDown")  # into the next layer
        until(page, "at.layer === 3")
        settle(page)
        assert at > code["entered"][2]
        until(page, "document.querySelector('#where').textContent.includes('Block.forward')")


def test_heads_are_chosen_by_keyboard_and_the_address_keeps_them(browser, port):
    with tab(browser, port, "#token=5&layer=7&head=4") as page:
        settle(page)
        page.focus("#grid")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
            page.keyboard.press(key)
        assert page.evaluate("[at.layer, at.head, at.token]") == [6, 6, 5]
        assert page.input_value("#head") == "6"
        assert "KV head 2" in page.inner_text("#served")
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        page.wait_for_selector("#tokens .chosen")
        assert page.evaluate("[at.layer, at.head, at.token]") == [6, 6, 5]


def test_forks_are_made_and_compared_in_the_page(browser, session, port):
    with tab(browser, port, "#layer=23&head=4&token=11") as page:
        settle(page)
        page.locator("#forks").scroll_into_view_if_needed()
        page.select_option("#fork select[name=kind]", "group")
        assert not page.is_visible("#patch-choice")  # what this change does not ask for
        page.click("#fork button")
        page.wait_for_selector("#compare h3")
        settle(page)
        number = page.evaluate("at.branch")
        assert session.branches[number].name == "layer 23 without heads 3, 4, 5"
        expected = session.view("compare", {"branch": number, "parent": 0})
        for id, _, before, after in expected["next"]:
            for name, p in (("before", before), ("after", after)):
                shown = page.inner_text(f"[data-{name}='{id}']")
                assert shown == (f"{100 * p:.1f}%" if p >= 0.0005 else f"{p:.0e}".replace("e-0", "e-"))
        assert "heads = torch.tensor([3, 4, 5])" in page.inner_text(f"[data-python='{number}']")
        page.locator("#decoding").scroll_into_view_if_needed()
        settle(page)
        page.fill("#beside input", "Yes")
        page.click("#beside button")
        page.wait_for_selector("#rows table")
        cells = page.eval_on_selector_all(
            "[data-row='1'] tr", "rows => rows.map((row) => row.innerText.split(/\\s+/))"
        )
        assert cells[1][-2:] == ["-1", "0"]
        assert {"padding", "Yes"} <= set(cells[3])
        before = page.evaluate("current().tokens.length")
        page.click("#step")
        until(page, f"current().tokens.length === {before + 1}")
        page.evaluate("select({ branch: 0, token: 3 })")
        settle(page)
        page.locator("#text").scroll_into_view_if_needed()
        page.locator("[data-fork]").nth(1).click()
        until(page, f"at.branch > {number}")
        settle(page)
        assert page.evaluate("current().tokens.length") == 5
        page.locator("#forks").scroll_into_view_if_needed()
        page.select_option("#fork select[name=kind]", "patch")
        page.select_option("#fork select[name=part]", "head")
        page.fill("#fork input[name=text]", "The capital of Spain")
        page.fill("#fork input[name=from]", "2")
        page.click("#fork button")
        until(page, f"at.branch > {number + 1}")
        made = session.branches[page.evaluate("at.branch")]
        assert made.name.startswith("head 4 of layer 23 at token ")
        assert made.name.endswith(" from token 2 of 'The capital of Spain'")
        page.evaluate("act('forget', { branch: 3 })")
        until(page, "state.branches.length === 3")
        page.evaluate(
            "act('forget', { branch: 2 }).then(() => act('forget', { branch: 1 })).then(() => select({}))"
        )
        until(page, "state.branches.length === 1")


def test_a_saved_page_opens_offline_with_the_same_figures(browser, session, port, tmp_path):
    place = "branch=0&token=4&layer=15&head=4&key=3"

    def figures(page: Any) -> Any:
        for name in ("code", "attention", "positions", "stream", "decoding", "forks", "text"):
            page.evaluate(f"document.querySelector('#{name}').scrollIntoView()")
            page.wait_for_timeout(150)
        settle(page)
        places = "td.figure, .stats, .words i, dd"
        return page.evaluate(f"[...document.querySelectorAll('{places}')].map((one) => one.textContent)")

    with tab(browser, port, f"#{place}") as page:
        live = figures(page)
    text = whole_page(answers(session, 15, 4))
    assert len(text) < 5e6
    assert len(live) > 200
    with opened(browser, tmp_path, text) as page:
        page.evaluate(f"location.hash = '{place}'")
        until(page, "at.token === 4 && at.layer === 15")
        assert figures(page) == live
        assert page.locator("#ask").is_hidden()
        page.evaluate("select({ layer: 3 })")
        page.evaluate("document.querySelector('#code').scrollIntoView()")
        page.wait_for_selector(".failed")
        assert "not in this file" in page.inner_text("#code .failed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_hostile_text_stays_text_on_a_phone(browser, tmp_path, scheme):
    folder = write_checkpoint(tmp_path)
    model, tokenizer = tinyllama.load(str(folder), device="cpu", dtype="float32", weights="exact")
    session = Session(model, tokenizer, tokenizer.encode(HOSTILE), HOSTILE, BUILT_IN)
    with (
        served(session) as port,
        tab(
            browser,
            port,
            viewport={"width": 390, "height": 800},
            color_scheme=scheme,
            refused=1,
            reduced_motion="reduce",
        ) as page,
    ):
        settle(page)
        for name in ("code", "attention", "positions", "stream", "decoding", "forks"):
            page.evaluate(f"document.querySelector('#{name}').scrollIntoView()")
            settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0
        page.fill("#prompt", HOSTILE * 2)
        page.click("#ask button")
        until(page, "!document.body.hasAttribute('aria-busy') && at.branch === 0")
        page.fill("#prompt", "a " * 2 + "b " * 400_000)
        page.click("#ask button")
        until(page, "document.querySelector('#message').textContent.includes('context')")


def test_two_thousand_tokens_can_be_explored(browser, tmp_path):
    folder = write_checkpoint(tmp_path)
    model, tokenizer = tinyllama.load(str(folder), device="cpu", dtype="float32", weights="exact")
    session = Session(model, tokenizer, tokenizer.encode("a dog " * 1100)[:2048], "tiny", BUILT_IN)
    assert len(session.branches[0].recording.ids) == 2048
    with served(session) as port, tab(browser, port, "#token=2000&layer=1&head=3") as page:
        settle(page)
        page.evaluate("document.querySelector('#attention').scrollIntoView()")
        until(page, "document.querySelector('#map').dataset.data === '2048'")
        settle(page)
        shown = "[...document.querySelectorAll('[data-weight]')].map((one) => Number(one.dataset.exact))"
        weights = page.evaluate(shown)
        row = session.view("row", {"layer": 1, "head": 3, "token": 2000})
        assert sorted(weights) == sorted(row)[-24:]


def test_a_notebook_shows_the_page_in_its_cell(browser, session, tmp_path):
    explored = tinyllama.explore(session.model, session.tokenizer, "a b")
    assert "2 tokens" in repr(explored)
    cell = explored._repr_html_()
    assert 'sandbox="allow-scripts"' in cell
    tab = browser.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.set_content(f"<p>a notebook</p>{cell}")
    frame = tab.frames[1]
    frame.wait_for_selector("#source .now")
    assert frame.locator("#tokens button").count() == 2
    tab.close()
    assert complaints == []
    explored.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8").endswith("</html>")
