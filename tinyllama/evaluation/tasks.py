"""Tasks by name: lm-evaluation-harness's, whose documents come from the Hub, or the toys beside this file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import datasets
import yaml
from huggingface_hub import constants, get_session
from lm_eval.api import task as task_module
from lm_eval.tasks import TaskManager

from tinyllama.advice import did_you_mean
from tinyllama.checkpoints.download import ANSWER_SECONDS, verdict, within
from tinyllama.checkpoints.files import one_line
from tinyllama.errors import InputError
from tinyllama.progress import note

TOY_FOLDER = Path(__file__).parent / "toy"

Loaded = Mapping[str, Any]  # of TaskManager.load: "tasks", "groups", ...


def toys() -> dict[str, dict[str, Any]]:
    """The toy tasks by name, as the harness reads them: small, of our own making, and on this disk."""
    files = sorted(TOY_FOLDER.glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text("utf-8")) for file in files}


@contextmanager
def loaded(names: Sequence[str], fewshot: int | None = None) -> Iterator[Loaded]:
    """The tasks, for as long as the block runs: `evaluate(model, tasks)` of the harness takes them.

    Args:
        names: of tasks, groups of them, or tags.
        fewshot: examples before each document; None: as each task says. A task that says 0 keeps 0.

    Raises:
        InputError: there is no such task, or its documents cannot be had.
    """
    own = toys()
    others = [name for name in names if name not in own]
    if others:
        note("reading the harness's index of tasks, some 15 seconds")
    manager = TaskManager(include_defaults=bool(others))
    known = [*own, *manager.all_tasks]
    for name in others:
        if name not in manager.task_index:
            near = did_you_mean(name, known)
            raise InputError(f"task {name!r:.80}: not one of the harness's {len(known):,}{near}; see --list")
    # The harness's cache of documents, in the user's folder, is for what was downloaded.
    with TemporaryDirectory(prefix="tinyllama-") as cache, _quiet():
        specs = [_on_this_disk(own[name], cache) if name in own else name for name in names]
        tasks = _load(manager, specs, others)
        for name, task in tasks["tasks"].items():
            _set_fewshot(name, task, fewshot)
        yield tasks


def _on_this_disk(task: dict[str, Any], cache: str) -> dict[str, Any]:
    """A toy's documents are files beside its YAML, wherever the harness is started."""
    files = {split: str(TOY_FOLDER / name) for split, name in task["dataset_kwargs"]["data_files"].items()}
    return {**task, "dataset_kwargs": {"data_files": files, "cache_dir": cache}}


def _load(manager: TaskManager, specs: Sequence[str | dict[str, Any]], others: Sequence[str]) -> Loaded:
    unreachable = _unreachable() if others else None
    # Without a Hub, documents on this disk are used, and for others there are no minutes of trying again.
    offline = constants.HF_HUB_OFFLINE or unreachable is not None
    try:
        with patch.object(datasets.config, "HF_HUB_OFFLINE", offline):
            return manager.load(specs)
    except Exception as error:  # a task's code is the harness's, and may raise anything
        if not others:
            raise
        names = ", ".join(others)
        if unreachable is not None:
            raise InputError(
                f"{names}: documents {unreachable}; toy tasks need no Hub: {', '.join(toys())}"
            ) from error
        raise InputError(f"{names}: cannot be loaded ({one_line(error)}); leave out what fails") from error


def _unreachable() -> str | None:
    """Why the Hub cannot be asked; None if it answers."""
    try:
        within(ANSWER_SECONDS, lambda: get_session().head(constants.ENDPOINT))
    except Exception as error:
        return verdict(error)[1]
    return None


def _set_fewshot(name: str, task: Any, fewshot: int | None) -> None:
    given = task.get_config("num_fewshot")
    if fewshot is None or given == 0:
        if fewshot:
            note(f"{name}: takes no examples, so it has none")
        fewshot = given or 0
    task.set_config("num_fewshot", fewshot)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that the harness and its reader of documents draw while they prepare."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with patch.object(task_module, "tqdm", partial(task_module.tqdm, disable=True)):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
