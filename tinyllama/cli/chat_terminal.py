"""How chat.py reads and writes at a terminal: edited lines, pasted texts, words that wrap whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.cells import cell_len

from tinyllama.progress import note

PROMPT = "> "


class Wrapped:
    """Writes text that comes in pieces, and breaks lines between words.

    A word is written when it ends. Characters two columns wide, such as Chinese ones, may stand at any
    place of a line.
    """

    def __init__(self, write: Callable[[str], object], width: int) -> None:
        self._write, self._width = write, width
        self._column, self._word = 0, ""

    def __call__(self, piece: str) -> None:
        """Take the next piece."""
        for character in piece:
            if character in "\n ":
                self.flush()
                self._blank(character)
            elif cell_len(character) == 2:
                self.flush()
                self._put(character)
            else:
                self._word += character
                if cell_len(self._word) >= self._width:  # longer than a line: it breaks somewhere
                    self.flush()

    def flush(self) -> None:
        """Write the word that may still go on."""
        if self._word:
            self._put(self._word)
        self._word = ""

    def _put(self, text: str) -> None:
        if self._column and self._column + cell_len(text) > self._width:
            self._blank("\n")
        self._write(text)
        self._column += cell_len(text)

    def _blank(self, character: str) -> None:
        if character == "\n":
            self._write("\n")
            self._column = 0
        elif self._column < self._width:
            self._write(" ")
            self._column += 1


def typed_messages(commands: list[str]) -> Iterator[str]:
    """What is typed or pasted, message by message; a second Ctrl-C in a row raises KeyboardInterrupt.

    A pasted text of several lines is one message. Alt-Enter begins a new line.

    Args:
        commands: the words that Tab completes.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    file = _history_file()
    session: PromptSession[str] = PromptSession(
        [("class:prompt", PROMPT)],
        style=Style.from_dict({"prompt": "bold ansicyan", "": "ansicyan"}),
        history=FileHistory(file) if file else InMemoryHistory(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        output=create_output(always_prefer_tty=True),  # stdout may be a file
    )
    warned = False
    while True:
        try:
            text = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                raise
            note("Ctrl-C once more leaves")
            warned = True
            continue
        warned = False
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a byte that is no character
            note("error: that message is not UTF-8; set the terminal to UTF-8")
        else:
            yield text


def _history_file() -> Path | None:
    """Where messages are kept for the next chat; None if the state folder cannot be used."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "tinyllama" / "chat_messages"
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        return file
    return None
