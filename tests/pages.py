"""What the tests of both pages share: a parser for a page, and a browser that opens it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

HOSTILE = "<script>alert(1)</script>\"'</style>&\u202e\x07{{ 7 * 7 }}"


class Read(html.parser.HTMLParser):
    """The tags, attributes, figures and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.shown: dict[str, tuple[str, str]] = {}
        self.text = ""
        self._key = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._key = dict(attrs).get("data-key", "")
        if self._key:
            self.shown[self._key] = (dict(attrs)["data-value"], "")

    def handle_endtag(self, tag):
        self._key = ""

    def handle_data(self, data):
        self.text += data
        if self._key:
            exact, text = self.shown[self._key]
            self.shown[self._key] = (exact, text + data)


def value_at(figures: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(figures, (list, tuple)):
            figures = figures[int(part)]
        else:
            figures = figures[part] if isinstance(figures, dict) else getattr(figures, part)
    return figures


def leaves(value: Any, key: str = "") -> Iterator[str]:
    """The key of every number and every text."""
    parts = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if parts is None:
        yield key
    for name, part in parts or ():
        yield from leaves(part, f"{key}.{name}".lstrip("."))


def nothing_but_the_one_style_is_allowed(source: str) -> None:
    """Fail if the page could load or run anything."""
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    read = Read(source)
    nothing_else = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'"
    assert ("content", nothing_else) in read.attributes
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(read.tags)
    assert all(name not in ("style", "src") and not name.startswith("on") for name, _ in read.attributes)
    assert all(value.startswith("#") for name, value in read.attributes if name == "href")
    assert "@import" not in style
    assert "url(" not in style


@contextmanager
def running_browser():
    """Start a browser; without one the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(names)}")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    quiet += ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=quiet)
        yield running
        running.close()


@contextmanager
def opened(browser, folder, source, width=1200, height=900, scheme="light"):
    """Open a page from disk, offline; a complaint of the browser fails the test."""
    file = folder / "page.html"
    file.write_text(source, encoding="utf-8")
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    tab, complaints, requests = context.new_page(), [], []
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    yield tab
    context.close()
    assert complaints == []
    assert requests == [file.as_uri()]


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) overlap; an empty text has no width."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across > 0 and down > 0


COLOURS = """
[...document.querySelectorAll('body *')]
  .filter(part => [...part.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
  .filter(part => part.getClientRects().length)
  .map(part => {
    let behind = part
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement
    const style = getComputedStyle(part)
    return [part instanceof SVGElement ? style.fill : style.color, getComputedStyle(behind).backgroundColor]
  })
"""


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def read_in_both_schemes(browser, folder, source):
    """Fail if a text is hard to read, with a contrast under 4.5, in light or in dark."""
    grounds = {}
    for scheme in ("light", "dark"):
        with opened(browser, folder, source, scheme=scheme) as tab:
            colours = {tuple(pair) for pair in tab.evaluate(COLOURS)}
            grounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert len(colours) > 4
        assert min(contrast(*pair) for pair in colours) >= 4.5, colours
    assert luminance(grounds["dark"]) < 0.1 < 0.8 < luminance(grounds["light"])
