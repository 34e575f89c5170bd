"""A file is replaced whole or not at all."""

import errno
from pathlib import Path

import pytest

from tinyllama.checkpoints.files import replace_text
from tinyllama.errors import InputError


def test_a_file_is_written_and_written_again(tmp_path):
    file = tmp_path / "page.html"
    for text in ("old, and longer than the new", "néw\n"):
        replace_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_where_writing_fails_the_old_file_stays_whole_and_nothing_else_is_left(tmp_path, monkeypatch, step):
    file = tmp_path / "page.html"
    file.write_text("old", encoding="utf-8")

    def full(path, *args, **kwargs):
        path.write_bytes(b"ne")  # as far as the disk had room
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(InputError, match=r"page.html: cannot be written \(No space left on device\)"):
        replace_text(file, "new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["absent/page.html", "folder"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        replace_text(tmp_path / place, "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
