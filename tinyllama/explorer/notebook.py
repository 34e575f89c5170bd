"""`tinyllama.explore(...)`: the explorer's page in a notebook's cell."""

from __future__ import annotations

from pathlib import Path

from tinyllama.explorer.page import answers, page, save
from tinyllama.explorer.recording import Recording
from tinyllama.explorer.session import Session
from tinyllama.model import Llama
from tinyllama.pages.cell import frame
from tinyllama.text.tokenizer import Tokenizer


class Explored:
    """A text and what the model computed for it; as the last expression of a cell, the page.

    Attributes:
        session: the text with its forks; `session.act("fork", {"kind": "mlp", "layer": 3})` makes one.
        recording: the values, for code.
    """

    def __init__(self, session: Session, layer: int, head: int) -> None:
        self.session, self._layer, self._head = session, layer, head

    @property
    def recording(self) -> Recording:
        """Of the text itself, without forks."""
        return self.session.branches[0].recording

    def save(self, path: str | Path) -> None:
        """Write the page to a file, which opens offline; raises InputError if it cannot be written."""
        save(self.session, Path(path), self._layer, self._head)

    def __repr__(self) -> str:
        """For a terminal."""
        return f"Explored({len(self.recording.ids)} tokens; .save('page.html') writes the page)"

    def _repr_html_(self) -> str:
        """The page, for a notebook."""
        return frame("tinyllama explorer", page(answers(self.session, self._layer, self._head)))


def explore(
    model: Llama, tokenizer: Tokenizer, text: str, *, layer: int | None = None, head: int = 0
) -> Explored:
    """Record a text, to look at in a notebook.

    Args:
        model: the model; its kernels are those that are recorded.
        tokenizer: its tokenizer.
        text: what it reads.
        layer: the one whose code the page holds; None: the middle one.
        head: the one that is chosen first.

    Raises:
        InputError: the text does not fit the context.
    """
    from tinyllama.lab.kernel_file import BUILT_IN

    session = Session(model, tokenizer, tokenizer.encode(text), "this model", BUILT_IN)
    middle = model.config.num_hidden_layers // 2
    return Explored(session, middle if layer is None else layer, head)
