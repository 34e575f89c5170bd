"""The folder of compiled libraries. What lies there runs, so nobody else may be able to write it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class BuildError(Exception):
    """There is no compiled code here; the message says why."""


def cache_folder() -> Path:
    """The folder, made if need be.

    Raises:
        BuildError: there is no such place.
    """
    if not hasattr(os, "getuid"):  # Windows
        raise BuildError("compiled code is built on Linux and macOS only")
    try:
        # A relative XDG_CACHE_HOME is to be ignored, says the XDG base directory specification.
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (given if given.is_absolute() else Path.home() / ".cache") / "tinyllama"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
        require_own(folder)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home folder
        raise BuildError(f"no folder for compiled code: {error}") from error
    return folder


def find_library(folder: Path, name: str) -> Path | None:
    """The library of that name, whole, if it is there.

    Raises:
        BuildError: somebody else could have written it.
    """
    for library in folder.glob(f"{name}.*.so"):
        require_own(library)
        if library.name == f"{name}.{library.stat().st_size}.so":
            return library
        library.unlink(missing_ok=True)  # cut off
    return None


def require_own(path: Path) -> None:
    """Raise BuildError if anybody but this user could have put code at that path."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(
            f"{path} is a link, another user's, or writable by others, so nothing is loaded from there; "
            "remove it, or set XDG_CACHE_HOME to a folder of yours"
        )
