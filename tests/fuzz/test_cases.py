"""What the campaign once found does not come back, and the campaign still finds what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CASES, Campaign
from tests.fuzz.judge import Judge, Outcome
from tests.fuzz.kinds import GENERATE, Case, kinds
from tests.marks import unix

pytestmark = unix
NAMES = sorted(path.stem for path in CASES.glob("*.json"))


@pytest.fixture
def campaign(judge: Judge, sound: Path) -> Campaign:
    """A campaign with nothing tried yet."""
    return Campaign(judge, sound)


@pytest.mark.parametrize("name", NAMES)
def test_a_case_that_was_found_behaves(campaign: Campaign, name: str):
    values = json.loads((CASES / f"{name}.json").read_text())
    assert campaign.faults(Case.from_json(values)) == []


def test_every_kind_is_tried(campaign: Campaign):
    for kind, cases in kinds(campaign.sound).items():
        campaign.search(kind, cases, number=0, examples=4)
    assert campaign.found == {}
    assert set(campaign.tried) == set(kinds(campaign.sound))


KERNELS = {
    "killed by SIGABRT": "import os; os.abort()",
    "exit status 3": "import os; os._exit(3)",
    "over 1 GB of memory": "x = b'x' * (9 << 27)",
    "control characters on stderr": "import os; os.write(2, b'\\x1b[2J')",
    "status 2 without one line that says why, at the end": "import os; os._exit(2)",
}


@pytest.mark.parametrize("fault", KERNELS)
def test_what_does_not_behave_is_seen(campaign: Campaign, fault: str):
    source = f"{KERNELS[fault]}\ndef f(q, k, v, context):\n    return q\n"
    case = Case("kernel", ("generate", "--attention", "k.py:f", *GENERATE[1:]), {"k.py": source.encode()})
    assert fault in campaign.faults(case)


def test_what_never_ends_is_ended_and_seen(judge: Judge, sound: Path, tmp_path: Path):
    argv = ("generate", "--attention", "k.py:f", *GENERATE[1:])
    command = Case("kernel", argv, {"k.py": b"while True: pass"}).command(sound, tmp_path / "at")
    assert judge(replace(command, seconds=1.0)).faults == ["no end"]


def test_a_traceback_is_seen_and_named_by_its_place():
    stderr = 'Traceback (most recent call last):\n  File "/x/tinyllama/a.py", line 3, in f\nKeyError: 1\n'
    assert Outcome(1, 0.1, 0, "", stderr).faults == [
        "exit status 1",
        "traceback: KeyError in tinyllama/a.py f",
    ]


def test_a_case_is_kept_as_it_is():
    case = Case("template", ("tokens", "--chat"), {"a": bytes(range(256))}, b"\xff\n")
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
