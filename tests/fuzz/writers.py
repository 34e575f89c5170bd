"""Every command that writes a file: what it leaves when it is killed, has no room or is not alone."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fuzz.judge import Command, Judge
from tests.fuzz.kinds import LIGHT, SHORT
from tinyllama.checkpoints.files import PARTIAL
from tinyllama.lab.healed import load_healed

OLD = b"what was there before"


@dataclass(frozen=True)
class Writer:
    """A command that writes a file.

    Attributes:
        argv: the command.
        path: the file, in the folder where the command runs.
        whole: raises an exception unless the file is all there.
        stdin: what the command reads.
        room: bytes of disk, too few for the file and enough for what is printed.
        old: what is in the file before; None: nothing, since the command continues from it.
    """

    argv: tuple[str, ...]
    path: str
    whole: Callable[[Path], object]
    stdin: bytes = b""
    room: int = 6000
    old: bytes | None = OLD

    def command(self, sound: Path, folder: Path) -> Command:
        """Lay out the folder for it."""
        shutil.copytree(sound, folder)
        if self.old is not None:
            (folder / self.path).write_bytes(self.old)
        return Command(self.argv, str(folder), self.stdin, seconds=120.0)

    def unchanged(self, folder: Path) -> bool:
        """Whether the file is as it was before."""
        path = folder / self.path
        return (path.read_bytes() if path.exists() else None) == self.old

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with what lies there now."""
        path = folder / self.path
        left = sorted(file.name for file in folder.rglob(".*") if not file.name.startswith(PARTIAL))
        found = [f"left {name}" for name in left]
        if not self.unchanged(folder):
            try:
                self.whole(path)
            except Exception as error:
                found.append(f"{self.path} is damaged: {type(error).__name__}")
        return found


def page(path: Path) -> None:
    """A page with its end."""
    if not path.read_text("utf-8").rstrip().endswith("</html>"):
        raise ValueError("no end")


def text(path: Path) -> None:
    """A conversation, as JSON."""
    json.loads(path.read_text("utf-8"))


MODEL = ("--model", "model", "--threads", "1")
WRITERS = {
    "chat": Writer(
        ("chat", "--model", "model", *SHORT), "new.json", text, b"a\n" * 3 + b"/save! new.json\n", room=200
    ),
    "lab": Writer(("lab", "window:size=4", *MODEL, *LIGHT, "--html", "lab.html"), "lab.html", page),
    "heal": Writer(
        ("heal", "window:size=4", *MODEL, "--text", "text.txt", "--steps", "9", "--save-every", "1",
         "--length", "16", "--batch", "1", "--out", "out"),
        "out", load_healed, old=None,
    ),
    "explore": Writer(
        ("explore", *MODEL, "--weights", "exact", "--html", "page.html", "a b"), "page.html", page
    ),
    "parity": Writer(
        ("parity", "model", "--quick", "--dtype", "float32", "--text", "text.txt", "--attention", "sdpa",
         "--html", "parity.html"),
        "parity.html", page,
    ),
    "bench": Writer(
        ("bench", "--model", "model", "--peers", "stored", "--rounds", "1", "--load-rounds", "1", "--steps",
         "2", "--contexts", "4", "--prefill", "4", "--rows", "2", "--json", "bench.json"),
        "bench.json", text,
    ),
}  # fmt: skip


def kill_at_random(judge: Judge, sound: Path, draw: random.Random, times: int) -> Iterator[str]:
    """Kill commands at random moments of their run; gives the faults."""
    for name in draw.choices(["chat", "lab", "heal", "explore"], k=times):
        writer = WRITERS[name]
        with tempfile.TemporaryDirectory() as scratch:
            command = writer.command(sound, Path(scratch) / "whole")
            seconds = judge(command).seconds
            folder = Path(scratch) / "killed"
            killed = writer.command(sound, folder)
            judge(replace(killed, kill_after=draw.uniform(0.01, seconds)))
            yield from (f"{name}: {fault}" for fault in writer.faults(folder))
