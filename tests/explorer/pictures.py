"""`python -m tests.explorer.pictures`: take the pictures of docs/explorer.md anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tinyllama
from tests.explorer.serving import SECRET, served
from tests.pages import running_browser
from tinyllama.explorer.session import Session
from tinyllama.lab.kernel_file import BUILT_IN

TEXT = "The capital of France is Paris, and the capital of Germany is"
FOLDER = Path(__file__).parents[2] / "docs" / "explorer"
KERNEL_CALL = "code.steps.findIndex((step) => step.values.some((value) => value.name === 'z'))"


def main() -> None:
    """Open the page, choose a head that matters, and photograph four sections."""
    model, tokenizer = tinyllama.load("smollm2", device="cpu", dtype="float32", weights="exact")
    session = Session(model, tokenizer, tokenizer.encode(TEXT), "smollm2", BUILT_IN)
    with served(session) as port, running_browser() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"http://127.0.0.1:{port}/{SECRET}/#token=12&layer=23&head=4&key=11")
        page.wait_for_selector("#source .now")
        page.evaluate(f"go({KERNEL_CALL})")
        page.evaluate("document.getElementById('bar').style.display = 'none'")  # it would lie over the rest
        take(page, "#code", "code")
        take(page, "#attention .atlas", "attention")
        take(page, "#stream", "stream")
        page.select_option("#fork select[name=kind]", "group")
        page.click("#fork button")
        page.wait_for_selector("#compare h3")
        take(page, "#forks", "what-if")


def take(page: Any, selector: str, name: str) -> None:
    """Photograph one section."""
    page.locator(selector).scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    page.locator(selector).screenshot(path=FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
