"""`python -m tests.walkthrough.build`: make the walkthrough's notebooks anew, with their outputs.

A source in docs/walkthrough has cells `%%% text` (English), `%%% 中文` (the same in Chinese) and `%%% code`.
Each language gets a notebook; the code is the same, runs once, and its outputs go into both. The pictures are
kept as files, too, for those who read without running.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parents[2] / "docs" / "walkthrough"
SOURCES = sorted(FOLDER.glob("*.txt"))
LANGUAGES = {"text": ".ipynb", "中文": ".zh-TW.ipynb"}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def cells(source: Path) -> list[tuple[str, str]]:
    """Pairs of a kind and a text."""
    parts = re.split(r"^%%% (\S+)\n", source.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return [(kind, text.strip("\n")) for kind, text in zip(parts[::2], parts[1::2], strict=True)]


def notebook(source: Path, language: str) -> Any:
    """The notebook in one of LANGUAGES, without outputs; a cell's id is its place."""
    made = []
    for place, (kind, text) in enumerate(cells(source)):
        if kind == "code":
            made.append(new_code_cell(text, id=f"cell-{place}"))
        elif kind == language:
            made.append(new_markdown_cell(text, id=f"cell-{place}"))
    return new_notebook(cells=made, metadata=KERNEL)


def run(made: Any) -> Any:
    """Run a notebook in a kernel of its own, and keep its outputs."""
    NotebookClient(
        made, timeout=300, coalesce_streams=True, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for cell in made.cells:
        cell.metadata = {}  # when each cell began and ended
    return made


def stored(source: Path, language: str) -> Any:
    """The notebook as it is kept."""
    return nbformat.read(source.with_suffix(LANGUAGES[language]), as_version=4)


def main() -> None:
    """Build them all."""
    for source in SOURCES:
        ran = run(notebook(source, "text"))
        outputs = {cell.id: cell for cell in ran.cells if cell.cell_type == "code"}
        for language, ending in LANGUAGES.items():
            made = notebook(source, language)
            made.cells = [outputs.get(cell.id, cell) for cell in made.cells]
            nbformat.write(made, source.with_suffix(ending))
        pictures = [
            output.data["image/png"]
            for cell in outputs.values()
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for number, picture in enumerate(pictures, 1):
            (FOLDER / f"{source.stem}-{number}.png").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
