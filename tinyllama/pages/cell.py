"""What results show as the last expression of a notebook's cell: HTML in which every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tinyllama.progress import escape


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; a column of figures is named with a # in front, and Markup in a cell is HTML already."""
    sides = [f"text-align: {'right' if name.startswith('#') else 'left'}" for name in columns]

    def row(kind: str, values: Sequence[Any]) -> Markup:
        cells = (
            Markup("<{0} style='{1}'>{2}</{0}>").format(kind, side, _safe(value))
            for side, value in zip(sides, values, strict=True)
        )
        return Markup("<tr>{}</tr>").format(Markup().join(cells))

    caption = Markup("<caption style='text-align: left'><b>{}</b></caption>").format(_safe(title))
    head = row("th", [name.lstrip("#") for name in columns])
    body = Markup().join(row("td", values) for values in rows)
    return Markup("<table>{}<thead>{}</thead><tbody>{}</tbody></table>").format(caption, head, body)


def squares(values: Mapping[str, float]) -> Markup:
    """A square for each value from 0 to 1, darker for more; its name and value appear under the pointer."""
    square = Markup(
        "<span title='{0}: {1:.2f}' style='display: inline-block; width: 1em; height: 1em; "
        "background: rgba(31, 119, 180, {1:.2f}); outline: 1px solid #8884'></span>"
    )
    return Markup().join(square.format(_safe(name), value) for name, value in values.items())


def frame(title: str, page: str) -> str:
    """A page in a frame of its own, whose scripts reach nothing else."""
    shape = Markup('sandbox="allow-scripts" style="width: 100%; height: 52rem; border: 1px solid #8884"')
    return Markup('<iframe title="{}" {} srcdoc="{}"></iframe>').format(
        title, shape, Markup.escape(str(page))
    )


def _safe(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup.escape(escape(str(value)))
