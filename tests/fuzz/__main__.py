"""`python -m tests.fuzz`: try inputs until the time is over, and keep what goes wrong as small cases.

Hypothesis draws cases and shrinks those that fail; a child process with limits runs each. A fault that was
found is not searched for again in the same run. Every case in cases/ is replayed by the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz.judge import Judge
from tests.fuzz.kinds import Case, kinds, make_sound
from tests.fuzz.writers import WRITERS, kill_at_random

CASES = Path(__file__).with_name("cases")
ROUND = 40  # cases of a kind before the next kind has its turn
SHRINKING = 45.0  # seconds


class FaultError(Exception):
    """A case that did not behave."""


class Campaign:
    """What was tried and found.

    Attributes:
        tried: cases by kind.
        found: faults by kind and words, each with its smallest case.
    """

    def __init__(self, judge: Judge, sound: Path) -> None:
        self.judge, self.sound = judge, sound
        self.tried: Counter[str] = Counter()
        self.found: dict[tuple[str, str], Case] = {}

    def faults(self, case: Case) -> list[str]:
        """Run it once."""
        with tempfile.TemporaryDirectory() as scratch:
            command = case.command(self.sound, Path(scratch) / "at")
            return self.judge(command).faults

    def search(self, kind: str, cases: SearchStrategy[Case], number: int, examples: int = ROUND) -> None:
        """Try some cases of a kind; a fault that is new is shrunk and noted."""
        smallest: dict[str, Case] = {}
        deadline: list[float] = []

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(cases)
        def attempt(case: Case) -> None:
            if deadline and time.monotonic() > deadline[0]:
                return  # shrinking is over; the smallest so far is kept
            self.tried[kind] += not deadline
            new = [fault for fault in self.faults(case) if (kind, fault) not in self.found]
            if new:
                deadline[:] = deadline or [time.monotonic() + SHRINKING]
                smallest[new[0]] = case
                raise FaultError(new[0])

        try:
            attempt()
        except BaseException as error:
            # Hypothesis says Flaky where shrinking ran out of time.
            if not smallest or isinstance(error, KeyboardInterrupt):
                raise
        self.found |= {(kind, fault): case for fault, case in smallest.items()}


def main() -> int:
    """Search; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--kind", action="append", help="only this one; may be repeated")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    make_sound(scratch / "sound")
    strategies = kinds(scratch / "sound")
    chosen = args.kind or [*strategies, "kills"]
    print(f"{args.seconds:.0f} s from seed {args.seed}: {', '.join(chosen)}", file=sys.stderr)
    until, number = time.monotonic() + args.seconds, args.seed
    with Judge() as judge:
        campaign = Campaign(judge, scratch / "sound")
        while time.monotonic() < until:
            for kind in chosen:
                number += 1
                if time.monotonic() > until:
                    break
                if kind == "kills":
                    draw = random.Random(number)
                    for fault in kill_at_random(judge, scratch / "sound", draw, times=len(WRITERS)):
                        print(f"kills: {fault}", file=sys.stderr)
                        campaign.found[kind, fault] = Case(kind, ())
                    campaign.tried[kind] += len(WRITERS)
                else:
                    campaign.search(kind, strategies[kind], number)
                print(
                    f"\r{sum(campaign.tried.values())} tried, {len(campaign.found)} faults  {kind:<20}",
                    end="",
                    file=sys.stderr,
                )
    print(file=sys.stderr)
    shutil.rmtree(scratch)
    for kind, count in campaign.tried.items():
        print(f"{kind:<20}{count:>7} tried")
    for (kind, fault), case in campaign.found.items():
        print(f"{kind}: {fault}")
        if case.argv:
            name = f"{kind}-{hashlib.sha256(fault.encode()).hexdigest()[:8]}".replace(" ", "-")
            text = json.dumps({"fault": fault, **case.to_json()}, indent=1)
            (CASES / f"{name}.json").write_text(text + "\n")
            print(f"  kept as {CASES / name}.json: {' '.join(case.argv)[:200]}")
    return int(bool(campaign.found))


if __name__ == "__main__":
    sys.exit(main())
