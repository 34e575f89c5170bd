"""What the HTML pages share: each is one file that loads nothing and can be read offline."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tinyllama.pages import chart
from tinyllama.progress import escape

Formatted = Callable[[str, Any], str]

# The control characters that a text of several lines keeps.
LINES = "\n\t"


def render(package: str, figures: Any, formatted: Formatted, *, connect: str = "'none'", **names: Any) -> str:
    """Render a package's `page.html`, with its `page.css` after the shared style and its `page.js`, if any.

    The template shows a figure by its key, the path to it (`cases.0.model`). It calls `cell`, `head` or
    `figure` for an element with the figure, its key and its exact value; `prose` for a figure that keeps its
    line breaks; `about` for the attributes alone; `plain` for a text with line breaks that is no figure.

    Args:
        package: where the two files are.
        figures: what the page is about: dataclasses, mappings and sequences.
        formatted: writes the figure of a key, given its value.
        connect: whom the script may ask, as Content-Security-Policy has it.
        names: what else the template needs.
    """

    def read(name: str) -> str:
        folder = files(package if name.startswith("page.") else __name__)
        return (folder / name).read_text(encoding="utf-8")

    style = read("base.css") + read("page.css")
    script = read("page.js") if (files(package) / "page.js").is_file() else ""
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{_sha256(style)}'"
    if script:
        policy += f"; script-src 'sha256-{_sha256(script)}'; connect-src {connect}"
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
        geometry=chart,
        cell=partial(tagged, "<td {}>{}</td>"),
        head=partial(tagged, '<th scope="row" {}>{}</th>'),
        figure=partial(tagged, "<span {}>{}</span>"),
        prose=partial(tagged, "<span {}>{}</span>", keep=LINES),
        about=partial(_about, figures),
        plain=lambda text: Markup.escape(escape(text, LINES)),
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        **names,
    )


def plain(value: Any) -> Any:
    """The value as JSON has it: a dataclass as its properties and fields, NaN and infinity as None."""
    if is_dataclass(value):
        properties = [name for name, one in vars(type(value)).items() if isinstance(one, property)]
        names = [*properties, *(field.name for field in fields(value))]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tagged(figures: Any, formatted: Formatted, element: str, key: str, keep: str = "") -> Markup:
    """The figure of that key in an element; control characters not in `keep` are written as escapes."""
    value = _value(figures, key)
    kind = "text" if isinstance(value, (str, bool, Mapping)) else "figure"
    about = Markup('class="{}" {}').format(kind, _about(figures, key))
    return Markup(element).format(about, escape(formatted(key, value), keep))


def _about(figures: Any, key: str) -> Markup:
    """Attributes: the key, and the exact value as JSON."""
    return Markup('data-key="{}" data-value="{}"').format(key, json.dumps(plain(_value(figures, key))))


def _value(figures: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(figures, (list, tuple)):
            figures = figures[int(part)]
        else:
            figures = figures[part] if isinstance(figures, Mapping) else getattr(figures, part)
    return figures


def _harmless(value: Any) -> Any:
    """Text with its invisible characters written as escapes, which autoescape does not do."""
    return escape(value) if type(value) is str else value


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
