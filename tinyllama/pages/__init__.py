"""What the pages share: one HTML file, no script, nothing from elsewhere, to be read offline."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tinyllama.progress import escape

Figures = dict[str, Any]
Formatted = Callable[[str, Any], str]

# What a text of several lines keeps of its control characters.
LINES = "\n\t"


def render(package: str, figures: Figures, formatted: Formatted, **names: Any) -> str:
    """A package's `page.html`, with its `page.css` after the shared style.

    The template shows a figure by its key ("cases.0.model"): as `cell`, `head` or `figure`, each with the key
    and the exact value as attributes. `prose` keeps its line breaks, `about` is the attributes alone, and
    `plain` is a text that is no figure, with its line breaks.

    Args:
        package: where the two files are.
        figures: what the page is about.
        formatted: how the figure of a key is written, given its value.
        names: what else the template needs.
    """

    def read(name: str) -> str:
        folder = files(package if name.startswith("page.") else __name__)
        return (folder / name).read_text(encoding="utf-8")

    style = read("base.css") + read("page.css")
    tagged = partial(_tagged, figures, formatted)
    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    return environment.get_template("page.html").render(
        figures=figures,
        cell=partial(tagged, "<td {}>{}</td>"),
        head=partial(tagged, '<th scope="row" {}>{}</th>'),
        figure=partial(tagged, "<span {}>{}</span>"),
        prose=partial(tagged, "<span {}>{}</span>", keep=LINES),
        about=partial(_about, figures),
        plain=lambda text: Markup.escape(escape(text, LINES)),
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{_sha256(style)}'",
        **names,
    )


def _tagged(figures: Figures, formatted: Formatted, element: str, key: str, keep: str = "") -> Markup:
    """The figure of that key in an element; its control characters are escapes, but for those to keep."""
    value = _value(figures, key)
    kind = "text" if isinstance(value, (str, bool, dict)) else "figure"
    about = Markup('class="{}" {}').format(kind, _about(figures, key))
    return Markup(element).format(about, escape(formatted(key, value), keep))


def _about(figures: Figures, key: str) -> Markup:
    """Attributes: the key, and the exact value as JSON."""
    return Markup('data-key="{}" data-value="{}"').format(key, json.dumps(_value(figures, key)))


def _value(figures: Figures, key: str) -> Any:
    value: Any = figures
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _harmless(value: Any) -> Any:
    """Text with its invisible characters as escapes, which autoescape knows nothing of."""
    return escape(value) if type(value) is str else value


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
