"""A model's name -> a checkpoint folder on disk, downloaded from the Hub if necessary."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

with warnings.catch_warnings():
    # In a notebook tqdm, which comes with it, asks for widgets; nothing here draws with them.
    warnings.filterwarnings("ignore", "IProgress not found")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

from tinyllama.advice import did_you_mean
from tinyllama.checkpoints.download import SHARD, RefusedError, UnreachableError, download, origin
from tinyllama.checkpoints.embedded import make_embedded
from tinyllama.checkpoints.files import GGUF, INDEX, SINGLE
from tinyllama.errors import InputError
from tinyllama.progress import note

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
REVISIONS = {DEFAULT_MODEL: "fe8a4ea1ffedaf415f4da2f062534de366a451e6"}
EMBEDDED_MODEL = "smollm2"
EMBEDDED_FOLDER = "SmolLM2-135M-Instruct"
# What people write, and the name that they mean.
NAMES = {
    DEFAULT_MODEL: DEFAULT_MODEL,
    DEFAULT_MODEL.split("/")[1]: DEFAULT_MODEL,
    "tinyllama": DEFAULT_MODEL,
    EMBEDDED_MODEL: EMBEDDED_MODEL,
    EMBEDDED_FOLDER: EMBEDDED_MODEL,
}


def weights_folder() -> Path:
    """Where checkpoints live: `weights/` in the checkout of this code, else in the current folder."""
    repository = Path(__file__).resolve().parents[2]
    return (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "weights"


def checkpoint_folders() -> list[Path]:
    """The folders in `weights/`, unfinished downloads left out."""
    return sorted(path for path in weights_folder().glob("[!.]*") if path.is_dir())


def resolve(name: str | None = None) -> Path:
    """Find a model's checkpoint folder; download or convert it if necessary.

    `name` is a folder, `org/name` on the Hub, or `smollm2`, the embedded model. A model found in `weights/`
    or in the Hub's own cache is used as it is: no socket is opened and nothing is written. None is the
    default model. If the Hub does not answer within a few seconds, the embedded model replaces it, and one
    line on stderr says so; a model asked for by name is never replaced.

    Raises:
        InputError: there is no such model, or it cannot be downloaded or converted.
    """
    try:
        return default_model() if name is None else named_model(name)
    except RefusedError as error:
        near = "" if name in (None, DEFAULT_MODEL) else did_you_mean(str(name), NAMES, NAMES)
        raise InputError(f"{error}{near}; without the Hub, `--model {EMBEDDED_MODEL}` works") from error


def named_model(name: str) -> Path:
    """The folder of a model that was asked for by name; never another model's."""
    if name == EMBEDDED_MODEL:
        return make_embedded(weights_folder() / EMBEDDED_FOLDER)
    folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):  # False for a name that no folder can have
        return folder
    for known in (EMBEDDED_MODEL, DEFAULT_MODEL):
        if name != known and name.lower() == known.lower():  # no other model has such a name
            return named_model(known)
    if name.lower().endswith(("-gguf", ".gguf")):
        raise InputError(f"model {name!r:.80}: {GGUF}, or {EMBEDDED_MODEL}")
    if is_repository(name):
        return found_or_downloaded(name)
    if os.path.isfile(folder):
        raise InputError(f"model {name!r} is a file, expected a checkpoint folder: give the folder it is in")
    present = ", ".join(str(path) for path in checkpoint_folders()) or "nothing yet"
    raise InputError(
        f"model {name!r:.80}: no such folder, nor a Hub name (org/name), nor {EMBEDDED_MODEL} (the embedded "
        f"model); in {weights_folder()} there is: {present}{did_you_mean(name, NAMES, NAMES)}"
    )


def default_model() -> Path:
    """The default model, or the embedded one if the Hub does not answer."""
    try:
        return found_or_downloaded(DEFAULT_MODEL)
    except UnreachableError as error:
        note(f"{error}; using the embedded {EMBEDDED_FOLDER} in its place")
        return make_embedded(weights_folder() / EMBEDDED_FOLDER)


def found_or_downloaded(repo_id: str) -> Path:
    """The folder of a model on the Hub; one in REVISIONS is downloaded at its pinned commit."""
    found = on_disk(repo_id)
    if found is None:
        found = folder_of(repo_id)
        download(repo_id, REVISIONS.get(repo_id), found)
    return found


def is_repository(name: str) -> bool:
    """Whether the name can be org/name on the Hub; `weights/name` means a folder that is not there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith("weights/")


def folder_of(repo_id: str) -> Path:
    """`weights/<name>`, or `weights/<org>--<name>` if another model has that name."""
    name = repo_id.split("/")[1]
    folder = weights_folder() / name
    other = name == EMBEDDED_FOLDER or origin(folder).split("@")[0] not in ("", repo_id)
    return folder.with_name(repo_id.replace("/", "--")) if other else folder


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
