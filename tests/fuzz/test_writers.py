"""What a command leaves of a file when something goes wrong: the old one or all of the new one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuzz.judge import Judge
from tests.fuzz.writers import WRITERS
from tests.marks import unix

pytestmark = unix
# What takes longer than seconds is killed and started twice by `make fuzz` alone.
QUICK = ["chat", "lab", "heal", "explore"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_read_only_is_said_in_one_line(judge: Judge, sound: Path, tmp_path: Path, name: str):
    writer, folder = WRITERS[name], tmp_path / "at"
    command = writer.command(sound, folder)
    folder.chmod(0o555)
    outcome = judge(replace(command, obedient=True))
    folder.chmod(0o755)
    assert (outcome.status, outcome.faults, writer.faults(folder)) == (2, [], [])
    assert writer.path in outcome.stderr
    assert writer.unchanged(folder)


@pytest.mark.parametrize("name", [*QUICK, "parity"])
def test_a_full_disk_is_said_in_one_line(judge: Judge, sound: Path, tmp_path: Path, name: str):
    writer, folder = WRITERS[name], tmp_path / "at"
    outcome = judge(replace(writer.command(sound, folder), largest_file=writer.room))
    assert (outcome.status, outcome.faults, writer.faults(folder)) == (2, [], [])
    assert writer.path in outcome.stderr
    assert writer.unchanged(folder)


@pytest.mark.parametrize("name", QUICK)
def test_two_at_once_both_end_well(judge: Judge, sound: Path, tmp_path: Path, name: str):
    writer, folder = WRITERS[name], tmp_path / "at"
    command = writer.command(sound, folder)
    for outcome in judge.together(command, command):
        assert (outcome.status, outcome.faults) == (0, [])
    assert writer.faults(folder) == []
    assert not writer.unchanged(folder)


@pytest.mark.parametrize("name", QUICK)
def test_what_is_killed_leaves_the_old_file_or_a_whole_one(
    judge: Judge, sound: Path, tmp_path: Path, name: str
):
    writer = WRITERS[name]
    seconds = judge(writer.command(sound, tmp_path / "whole")).seconds
    for share in (0.3, 0.9, 0.99):
        folder = tmp_path / str(share)
        judge(replace(writer.command(sound, folder), kill_after=share * seconds))
        assert writer.faults(folder) == []
