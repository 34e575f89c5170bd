"""Only regular JSON files are read; files and folders appear whole or not at all."""

import errno
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tests.marks import unix
from tinyllama.checkpoints import files
from tinyllama.checkpoints.files import (
    MAX_TEXT_BYTES,
    UNFINISHED,
    make_folder,
    read_json,
    replace_text,
    require_space,
)
from tinyllama.errors import InputError

# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model_type": "\xff"}', "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, fault):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json: .*{fault}") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def huge_file(path):
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        pytest.param(lambda path: os.mkfifo(path), "expected a regular file", marks=unix),
        (os.mkdir, "expected a regular file"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "expected a regular file", marks=unix),
        (lambda path: path.symlink_to("nowhere"), "expected a regular file"),
        (lambda path: None, "no such file"),
        (huge_file, f"at most {MAX_TEXT_BYTES}"),
    ],
)
def test_only_regular_files_of_limited_size_are_read(tmp_path, make, fault):
    make(tmp_path / "config.json")
    with pytest.raises(InputError, match=rf"config\.json: .*{fault}"):
        read_json(tmp_path / "config.json")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "config.json").touch()
    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(Permission denied\)"):
        read_json(tmp_path / "config.json")


# --- folders ---------------------------------------------------------------------------------------------


def names_in(folder):
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def fill(folder):
    folder.mkdir(exist_ok=True)
    (folder / "new").touch()


def fail(error):
    """A `fill` that writes something and then fails."""

    def fill_and_fail(folder):
        fill(folder)
        raise error

    return fill_and_fail


def test_a_folder_is_made_once(tmp_path):
    target = tmp_path / "weights" / "model"
    make_folder(target, fill, "making it")
    assert names_in(tmp_path / "weights") == {"model"}
    make_folder(target, fail(AssertionError("filled twice")), "making it")
    assert names_in(target) == {"new"}


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "raised"),
    [(FULL, InputError), (KeyboardInterrupt(), KeyboardInterrupt), (InputError("refused"), InputError)],
)
@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_leaves_no_folder_and_no_lock(tmp_path, error, raised, keep):
    with pytest.raises(raised, match="No space left on device" if error is FULL else None):
        make_folder(tmp_path / "model", fail(error), "making it", keep=keep)
    assert names_in(tmp_path) == ({f"{UNFINISHED}model"} if keep else set())
    make_folder(tmp_path / "model", fill, "making it", keep=keep)
    assert names_in(tmp_path) == {"model"}


@pytest.mark.parametrize("keep", [False, True])
def test_the_leftovers_of_a_killed_process_are_removed_or_used(tmp_path, keep):
    (tmp_path / f"{UNFINISHED}model").mkdir()
    (tmp_path / f"{UNFINISHED}model" / "old").touch()
    make_folder(tmp_path / "model", fill, "making it", keep=keep)
    assert names_in(tmp_path / "model") == ({"old", "new"} if keep else {"new"})
    assert names_in(tmp_path) == {"model"}


def test_of_two_at_once_one_fills_and_the_other_waits(tmp_path, monkeypatch):
    # flock belongs to an open file, so two threads contend for it as two processes do.
    filling, waiting, notes = threading.Event(), threading.Event(), []

    def slow_fill(folder):
        filling.set()
        assert waiting.wait(10)
        fill(folder)

    def note(line):
        notes.append(line)
        waiting.set()

    monkeypatch.setattr(files, "note", note)
    first = threading.Thread(target=make_folder, args=[tmp_path / "model", slow_fill, "making it"])
    first.start()
    assert filling.wait(10)
    make_folder(tmp_path / "model", fail(AssertionError("filled twice")), "making it")
    first.join()
    assert names_in(tmp_path / "model") == {"new"}
    assert notes == ["another process is making it: waiting for it"]


def test_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(InputError, match="/dev/null/weights/model: cannot be written"):
        make_folder(Path("/dev/null/weights/model"), fill, "making it")


def test_a_full_disk_is_refused_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 7, 3))
    require_space(tmp_path, 3, "it")
    with pytest.raises(InputError, match="it needs 1,234 bytes of disk, 3 are free"):
        require_space(tmp_path, 1234, "it")


# --- text files ------------------------------------------------------------------------------------------


def test_a_file_is_written_and_written_again(tmp_path):
    file = tmp_path / "page.html"
    for text in ("old, and longer than the new", "néw\n"):
        replace_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_if_writing_fails_the_old_file_stays_and_nothing_else(tmp_path, monkeypatch, step):
    file = tmp_path / "page.html"
    file.write_text("old", encoding="utf-8")

    def full(path, *args, **kwargs):
        path.write_bytes(b"ne")  # as far as the disk had room
        raise FULL

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(InputError, match=r"page.html: cannot be written \(No space left on device\)"):
        replace_text(file, "new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_writer_left_is_removed_by_one_of_the_next_day(tmp_path):
    days = {".tinyllama-partial-old": 2, ".tinyllama-partial-new": 0.5, ".tinyllama-mine": 2}
    for name, age in days.items():
        left = tmp_path / name
        left.mkdir()
        (left / "file").write_text("half")
        os.utime(left, (time.time() - age * 86400,) * 2)
    replace_text(tmp_path / "page.html", "whole")
    assert sorted(os.listdir(tmp_path)) == [".tinyllama-mine", ".tinyllama-partial-new", "page.html"]


@unix
def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: cannot be written"):
        replace_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path):
    # The name of a kernel's file need not be UTF-8, and it is in the page.
    replace_text(tmp_path / "page.html", "kernel \udcff.py")
    assert (tmp_path / "page.html").read_text("utf-8") == r"kernel \udcff.py"


@pytest.mark.parametrize("place", ["absent/page.html", "folder"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        replace_text(tmp_path / place, "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
