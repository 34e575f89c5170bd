"""Loads in fresh processes: the time from the checkpoint's files to a first token, and the memory it takes.

A process is `python -m tinyllama.bench.loads NAME SETUP`, SETUP as JSON; it prints its `Load` as JSON.
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before torch, transformers or llama.cpp is imported

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402

from tinyllama.bench.peers import Setup, make_peer  # noqa: E402
from tinyllama.bench.results import Load  # noqa: E402
from tinyllama.progress import step_progress  # noqa: E402

CONTEXT = 64  # enough for a first token
STATUS = Path("/proc/self/status")


def measure_loads(names: Sequence[str], setup: Setup, rounds: int) -> dict[str, Load]:
    """The median load of each peer, measured in turn; one more round comes first, for the file cache."""
    if rounds == 0:
        return {}
    taken: dict[str, list[Load]] = {name: [] for name in names}
    with step_progress(len(names) * (rounds + 1)) as step:
        for _ in range(rounds + 1):
            for name in names:
                taken[name].append(load_in_fresh_process(name, setup))
                step(f"load {name} in a fresh process")
    return {name: middle(loads[1:]) for name, loads in taken.items()}


def middle(loads: Sequence[Load]) -> Load:
    """Each figure's median."""
    peaks = [load.peak_bytes for load in loads if load.peak_bytes is not None]
    return Load(
        median(load.seconds for load in loads),
        median(load.with_imports for load in loads),
        round(median(peaks)) if peaks else None,
    )


def load_in_fresh_process(name: str, setup: Setup) -> Load:
    """What `measure_load` finds in a process of its own."""
    fields = json.dumps(asdict(replace(setup, context=CONTEXT)))
    command = [sys.executable, "-m", "tinyllama.bench.loads", name, fields]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def measure_load(name: str, setup: Setup) -> Load:
    """Load a peer in this process and compute one token."""
    peer = make_peer(name, setup)
    before, start = memory("VmRSS"), time.perf_counter()
    peer.load()
    peer.prefill(1)
    end = time.perf_counter()
    highest = memory("VmHWM")
    peak = None if before is None or highest is None else highest - before
    return Load(end - start, end - START, peak)


def memory(field: str) -> int | None:
    """Bytes of this process's memory: VmRSS is now, VmHWM the highest so far; None outside of Linux."""
    for line in STATUS.read_text().splitlines() if STATUS.exists() else []:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    print(json.dumps(asdict(measure_load(sys.argv[1], Setup(**json.loads(sys.argv[2]))))))
