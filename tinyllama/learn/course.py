"""A learner's file: the skeleton it begins with, its functions, and how far they have come."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from tinyllama.checkpoints.files import read_json, replace_text
from tinyllama.errors import InputError
from tinyllama.lab.kernel_file import python_file
from tinyllama.learn.hints import HINTS
from tinyllama.learn.judge import STEPS, Function


def read(path: Path) -> dict[str, Function]:
    """The functions of a learner's file, by step."""
    module = vars(python_file(path))
    found = {name: module[name] for name in STEPS if callable(module.get(name))}
    if not found:
        raise InputError(f"{path}: has none of the functions {', '.join(STEPS)}; begin with learn.py start")
    return found


def start(path: Path) -> None:
    """Write the skeleton; raises InputError if the file is there."""
    if path.exists():
        raise InputError(f"{path}: is there already, and nothing is written over; give another name")
    skeleton = (files("tinyllama.learn") / "skeleton.txt").read_text("utf-8")
    replace_text(path, skeleton.replace("{name}", path.name))


@dataclass
class Progress:
    """What a learner has done, in a file beside theirs.

    Attributes:
        right: the steps that were right at the last check.
        hints: how many hints of each step were shown.
    """

    right: list[str]
    hints: dict[str, int]

    @staticmethod
    def of(path: Path) -> Progress:
        """Read the progress that is kept beside a learner's file."""
        place = Progress.place(path)
        if not place.exists():
            return Progress([], {})
        try:
            values = read_json(place)
            return Progress(
                [str(one) for one in values["right"]], {str(k): int(n) for k, n in values["hints"].items()}
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{place}: is not a file that learn.py wrote; remove it to begin anew"
            ) from error

    @staticmethod
    def place(path: Path) -> Path:
        """The file that keeps the progress of a learner's file."""
        return path.with_name(f"{path.stem}.progress.json")

    def save(self, path: Path) -> None:
        """Write the progress to its file."""
        replace_text(self.place(path), json.dumps(asdict(self), indent=1) + "\n")


def hint(path: Path, step: str) -> list[str]:
    """One hint more for a step than the last time; the last one is the formula."""
    if step not in HINTS:
        raise InputError(f"{step!r:.40} is no step; expected {', '.join(STEPS)}")
    if not path.exists():
        raise InputError(f"{path}: no such file; begin with learn.py start {path}")
    progress = Progress.of(path)
    progress.hints[step] = min(progress.hints.get(step, 0) + 1, len(HINTS[step]))
    progress.save(path)
    return list(HINTS[step][: progress.hints[step]])
