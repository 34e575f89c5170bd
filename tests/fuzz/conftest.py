"""One server and one sound folder for all tests of the campaign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.judge import Judge
from tests.fuzz.kinds import make_sound


@pytest.fixture(scope="session")
def judge() -> Iterator[Judge]:
    """Runs commands."""
    with Judge() as judge:
        yield judge


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each command starts from."""
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    make_sound(folder)
    return folder
