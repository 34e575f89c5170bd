"""A model's name -> a checkpoint folder on disk, downloaded from the Hub where need be."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from pathlib import Path
from threading import Thread
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from tinyllama.checkpoints.embedded import make_embedded
from tinyllama.checkpoints.files import INDEX, PICKLES, SINGLE, require_space, sole_writer
from tinyllama.errors import InputError
from tinyllama.progress import note

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
REVISIONS = {DEFAULT_MODEL: "fe8a4ea1ffedaf415f4da2f062534de366a451e6"}
EMBEDDED_MODEL = "smollm2"
EMBEDDED_FOLDER = "SmolLM2-135M-Instruct"

ANSWER_SECONDS = 5.0
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
ORIGIN = ".origin"  # inside a downloaded folder: the repository and commit that it is
LOG_IN = "log in with `hf auth login`"

Answer = TypeVar("Answer")


class RefusedError(InputError):
    """The Hub does not give out the model that was asked for."""


class UnreachableError(RefusedError):
    """The Hub did not even answer."""


def weights_folder() -> Path:
    """Where checkpoints live: `weights/` in the checkout of this code, else in the current folder."""
    repository = Path(__file__).resolve().parents[2]
    return (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "weights"


def checkpoint_folders() -> list[Path]:
    """The folders in `weights/`, unfinished downloads left out."""
    return sorted(path for path in weights_folder().glob("[!.]*") if path.is_dir())


def resolve(name: str | None = None) -> Path:
    """Find a model's checkpoint folder, downloading or converting it where need be.

    `name` is a folder, `org/name` on the Hub, or `smollm2`, the embedded model. A model found in `weights/`
    or in the Hub's own cache is used as it is: no socket is opened and nothing is written. None is the
    default model; only there, and only where the Hub does not answer within a few seconds, the embedded
    model takes its place, and one line on stderr says so. Whatever else goes wrong raises InputError.
    """
    try:
        return default_model() if name is None else named_model(name)
    except RefusedError as error:
        raise InputError(f"{error}; without the Hub, `--model {EMBEDDED_MODEL}` works") from error


def named_model(name: str) -> Path:
    """The folder of a model that was asked for by name; never another model's."""
    if name == EMBEDDED_MODEL:
        return make_embedded(weights_folder() / EMBEDDED_FOLDER)
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return folder
    if is_repository(name):
        return on_disk(name) or download(name)
    if folder.is_file():
        raise InputError(f"model {name!r} is a file, expected a checkpoint folder: give the folder it is in")
    present = ", ".join(str(path) for path in checkpoint_folders()) or "nothing yet"
    raise InputError(
        f"model {name!r}: no such folder, nor a Hub name (org/name), nor {EMBEDDED_MODEL} (the embedded "
        f"model); in {weights_folder()} there is: {present}"
    )


def default_model() -> Path:
    """The default model, or the embedded one where the Hub does not answer."""
    try:
        return on_disk(DEFAULT_MODEL) or download(DEFAULT_MODEL)
    except UnreachableError as error:
        note(f"{error}; using the embedded {EMBEDDED_FOLDER} in its place")
        return make_embedded(weights_folder() / EMBEDDED_FOLDER)


def is_repository(name: str) -> bool:
    """Whether the name can be org/name on the Hub; `weights/name` is a folder that is not there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith("weights/")


def folder_of(repo_id: str) -> Path:
    """`weights/<name>`, or `weights/<org>--<name>` where another model has that name."""
    name = repo_id.split("/")[1]
    folder = weights_folder() / name
    other = name == EMBEDDED_FOLDER or origin(folder).split("@")[0] not in ("", repo_id)
    return folder.with_name(repo_id.replace("/", "--")) if other else folder


def origin(folder: Path) -> str:
    """`org/name@commit` of a downloaded folder, empty for any other."""
    file = folder / ORIGIN
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def on_disk(repo_id: str) -> Path | None:
    """The model's folder in `weights/`, or in the Hub's own cache if it is complete there, else None."""
    folder = folder_of(repo_id)
    if folder.is_dir():
        return folder
    config = try_to_load_from_cache(repo_id, "config.json", revision=REVISIONS.get(repo_id))
    if not isinstance(config, str):
        return None
    names = {path.name for path in Path(config).parent.iterdir() if path.is_file()}
    shards = [match for match in map(SHARD.fullmatch, names) if match]
    has_weights = SINGLE in names or (INDEX in names and shards and len(shards) == int(shards[0][1]))
    has_tokenizer = "tokenizer.model" in names or "tokenizer.json" in names
    return Path(config).parent if has_weights and has_tokenizer else None


def download(repo_id: str) -> Path:
    """Download a model's safetensors checkpoint into `weights/`; returns its folder.

    Models in REVISIONS come at their pinned commit, others at the present commit of main, which is written
    into the folder. The folder appears whole or not at all; an interrupted download keeps its finished files
    aside for the next one. Two processes at once download once. Raises UnreachableError where the Hub does
    not answer in time, InputError where it refuses, there are no safetensors, or the disk is too full.
    """
    target = folder_of(repo_id)
    with sole_writer(target, f"downloading {repo_id}"):
        if target.is_dir():
            return target
        info = ask_hub(repo_id, REVISIONS.get(repo_id))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        needed = {name: sizes[name] for name in needed_files(repo_id, sizes.keys())}
        partial = target.with_name(f".download-{target.name}")
        try:
            fetch(f"{repo_id}@{info.sha}", needed, partial)
            shutil.rmtree(partial / ".cache", ignore_errors=True)
            partial.rename(target)
        except (HTTPError, OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise InputError(
                    f"{partial}: the disk is full; free some space and run this again"
                ) from error
            raise InputError(
                f"downloading {repo_id} stopped ({one_line(error)}); run this again, finished files are kept"
            ) from error
    return target


def needed_files(repo_id: str, names: Collection[str]) -> list[str]:
    """Of a repository's files, those of one safetensors checkpoint and its tokenizer."""
    if "config.json" not in names:
        raise InputError(
            f"{repo_id}: expected config.json, the repository has none: not a transformers model"
        )
    shards = sorted(filter(SHARD.fullmatch, names))
    if SINGLE in names:
        weights = [SINGLE]
    elif INDEX in names and shards:
        weights = [INDEX, *shards]
    else:
        pickles = [name for name in names if name.endswith(PICKLES)]
        found = f"only {pickles[0]}, refused: pickle can run any code" if pickles else "none"
        raise InputError(f"{repo_id}: expected {SINGLE} or {INDEX} and its shards, found {found}")
    return [name for name in TEXT_FILES if name in names] + weights


def fetch(source: str, sizes: dict[str, int], partial: Path) -> None:
    """Download the files of `org/name@commit` into `partial`, but for those that are there already."""
    if origin(partial) != source:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / ORIGIN).write_text(source, encoding="utf-8")
    for leftover in partial.rglob("*.incomplete"):
        leftover.unlink()  # of a killed process: huggingface_hub never goes on with them
    missing = sum(size for name, size in sizes.items() if not (partial / name).is_file())
    require_space(partial, missing, f"downloading {source}")
    note(f"downloading {source} ({missing:,} bytes)")
    repo_id, commit = source.split("@")
    # One by one, not snapshot_download: its threads would finish their files before Ctrl-C gets through.
    for name in sizes:
        hf_hub_download(repo_id, name, revision=commit, local_dir=partial)


def ask_hub(repo_id: str, revision: str | None) -> ModelInfo:
    """The repository's commit, files and their sizes; errors say what to do."""
    try:
        return within(
            ANSWER_SECONDS,
            lambda: HfApi().model_info(
                repo_id, revision=revision, files_metadata=True, timeout=2 * ANSWER_SECONDS
            ),
        )
    except (NoAnswerError, HTTPError, OSError, ValueError) as error:
        kind, reason = verdict(error)
        raise kind(f"{repo_id} at revision {revision or 'main'}: {reason}") from error


def verdict(error: Exception) -> tuple[type[RefusedError], str]:
    """Whether the Hub refused or is out of reach, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError) or status == 403:
        return RefusedError, f"gated (status {status}): accept its terms on its Hub page, then {LOG_IN}"
    if status == 401:
        return RefusedError, f"private, not there, or a wrong login (status 401): check the name, or {LOG_IN}"
    if status == 429:
        return RefusedError, f"the Hub takes no more requests (status 429): wait some minutes, or {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return RefusedError, "the Hub has the model, but no such revision (status 404)"
    if status == 404:
        return RefusedError, "the Hub has no such model (status 404): check the name"
    if 400 <= status < 500:
        return RefusedError, f"the Hub refused the request (status {status})"
    if status:
        reason = f"the Hub is out of order (status {status})"
    elif isinstance(error, NoAnswerError):
        reason = f"the Hub did not answer within {ANSWER_SECONDS:g} seconds"
    elif isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = f"the Hub cannot be reached ({one_line(error)})"
    return UnreachableError, f"not on this disk, and {reason}"


def within(seconds: float, task: Callable[[], Answer]) -> Answer:
    """The task's result, or NoAnswerError after that many seconds.

    A thread, because the client's time-out starts anew with each address and each read, and does not cover
    name resolution; a daemon, so that a hanging one does not keep the program from ending.
    """
    future: Future[Answer] = Future()

    def work() -> None:
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future.result(timeout=seconds)


def one_line(error: Exception) -> str:
    """The error's first line, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
