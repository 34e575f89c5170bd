"""org/name on the Hub -> a checkpoint folder, and a message for each way in which that can fail."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from pathlib import Path
from threading import Thread
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from tinyllama.checkpoints.files import (
    INDEX,
    SINGLE,
    make_folder,
    one_line,
    other_weights,
    require_space,
)
from tinyllama.errors import InputError
from tinyllama.progress import note

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
REFUSALS = {
    401: "private, not there, or a wrong login: check the name, or log in with `hf auth login`",
    403: "gated: accept its terms on its Hub page, then log in with `hf auth login`",
    404: "the Hub has no such model: check the name",
    429: "the Hub accepts no more requests now: wait some minutes, or log in with `hf auth login`",
}

Answer = TypeVar("Answer")


class RefusedError(InputError):
    """The Hub does not give the model that was asked for."""


class UnreachableError(RefusedError):
    """The Hub did not answer."""


def download(repo_id: str, revision: str | None, folder: Path) -> None:
    """Download a model's safetensors checkpoint into a new folder.

    A revision of None is the latest commit of main. The folder appears whole or not at all; an interrupted
    download keeps its finished files for the next one. Two processes at once download once. Raises
    UnreachableError if the Hub does not answer in time, InputError if it refuses, there are no safetensors,
    or the disk is too full.
    """
    make_folder(folder, lambda new: fetch(repo_id, revision, new), f"downloading {repo_id}", keep=True)


def download_config(repo_id: str) -> Path:
    """A model's config.json alone, in the Hub's own cache."""
    commit = ask_hub(repo_id, None).sha
    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=commit))
    except (HTTPError, OSError, RuntimeError) as error:
        raise InputError(f"{repo_id}: config.json: {one_line(error)}; check the name") from error


def origin(folder: Path) -> str:
    """`org/name@commit` of a downloaded folder, empty for any other."""
    file = folder / ORIGIN
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def fetch(repo_id: str, revision: str | None, folder: Path) -> None:
    """Download the files that the folder lacks, after emptying it if it is of another commit.

    The files come one by one with `hf_hub_download`. `snapshot_download` (huggingface_hub 2.4) is not used:
    there Ctrl-C waits until the files in progress are complete, and where the folder already has some files,
    a Hub that answers 401, 403, 404, 429 or 503 is a warning and the incomplete folder the result.
    """
    info = ask_hub(repo_id, revision)
    source = f"{repo_id}@{info.sha}"
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    needed = needed_files(repo_id, sizes.keys())
    if origin(folder) != source:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / ORIGIN).write_text(source, encoding="utf-8")
    for leftover in folder.rglob("*.incomplete"):
        leftover.unlink()  # left by a killed process; huggingface_hub never resumes them
    missing = sum(sizes[name] for name in needed if not (folder / name).is_file())
    require_space(folder, missing, f"downloading {source}")
    note(f"downloading {source} ({missing:,} bytes)")
    try:
        for name in needed:
            hf_hub_download(repo_id, name, revision=info.sha, local_dir=folder)
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"downloading {repo_id} stopped ({one_line(error)}); run this again, finished files are kept"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def needed_files(repo_id: str, names: Collection[str]) -> list[str]:
    """The files of one safetensors checkpoint and its tokenizer, of all that a repository has."""
    found = other_weights(names)
    if "config.json" not in names and "gguf" not in found:
        raise InputError(
            f"{repo_id}: expected config.json, the repository has none: not a transformers model"
        )
    shards = sorted(filter(SHARD.fullmatch, names))
    if SINGLE in names:
        weights = [SINGLE]
    elif INDEX in names and shards:
        weights = [INDEX, *shards]
    else:
        raise InputError(f"{repo_id}: expected {SINGLE} or {INDEX} and its shards, found {found}")
    return [name for name in TEXT_FILES if name in names] + weights


def ask_hub(repo_id: str, revision: str | None) -> ModelInfo:
    """The repository's commit, files and their sizes; raises RefusedError that says what to do."""
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
    if 400 <= status < 500:
        if isinstance(error, GatedRepoError):
            status = 403
        reason = REFUSALS.get(status, "the Hub refused the request")
        if isinstance(error, RevisionNotFoundError):
            reason = "the Hub has the model, but no such revision"
        return RefusedError, f"{reason} (status {status})"
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

    A thread, because the client's time-out restarts with each address and each read, and does not cover
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
