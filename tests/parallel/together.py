"""Ranks for tests: as threads of this process, or as processes that meet in a file."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama.model import Llama
from tinyllama.parallel.layers import connect, narrow
from tinyllama.parallel.plan import Plan
from tinyllama.parallel.ranks import Ranks

SECONDS = 60.0  # no test waits longer for a rank

# Processes start as copies of one that has imported all this.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.parallel.together", "tests.parallel.jobs"])


class Meeting:
    """Where threads leave what they send."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every thread's value, in order."""
        self.values[rank] = value
        self.barrier.wait(SECONDS)
        values = list(self.values)
        self.barrier.wait(SECONDS)
        return values


class Threads(Ranks):
    """Ranks that are threads."""

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self.meeting, self.rank, self.size, self.device = meeting, rank, size, torch.device("cpu")

    def divide(self, stages: int) -> Threads:
        size = self.size // stages
        meetings = self.meeting.exchange(self.rank, Meeting(size))  # of each stage, that of its first rank
        return type(self)(meetings[self.rank - self.rank % size], self.rank % size, size)

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        assert x.shape[-1] == widths[self.rank]
        return [one.clone() for one in self.meeting.exchange(self.rank, x.detach().clone())]

    def send(self, x: Tensor, source: int) -> Tensor:
        sent = self.meeting.exchange(self.rank, x.detach())[source]
        assert (sent.shape, sent.dtype) == (x.shape, x.dtype)
        return sent.clone()

    def _exchange(self, value: str) -> list[str]:
        return self.meeting.exchange(self.rank, value)

    def agree(self, chosen: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, chosen)[0]


def in_threads(
    model: Llama,
    size: int,
    job: Callable[[Llama], Any],
    mode: str = "exact",
    stages: int = 1,
    *,
    kind: type[Threads] = Threads,
    narrowed: Callable[[Plan], Plan] = lambda plan: plan,
    part_of: Callable[[int], int] = lambda rank: rank,
) -> list[Any]:
    """What each rank's job gives for its part of the model; the last three arguments can plant a mistake."""
    plan, meeting = Plan.of(model.config, size, mode, stages), Meeting(size)

    def run(rank: int) -> Any:
        part = copy.deepcopy(model)
        narrow(part, narrowed(plan), part_of(rank))
        connect(part, plan, kind(meeting, rank, size))
        return job(part)

    return run_in_threads(size, meeting, run)


def run_in_threads(size: int, meeting: Meeting, job: Callable[[int], Any]) -> list[Any]:
    """What the job gives for each rank, without gradients unless it asks for them."""
    results = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = job(rank)
        except BaseException as error:
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


def in_processes(size: int, folder: Path, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `job(ranks, *arguments)` gives on each rank, every rank a process with one thread."""
    folder.mkdir()
    ranks = [
        processes.Process(target=_process, args=(rank, size, folder, job, arguments)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(2 * SECONDS)
        if process.is_alive():
            process.kill()
    said = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert [process.exitcode for process in ranks] == [0] * size, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _process(rank: int, size: int, folder: Path, job: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    try:
        ranks = Ranks(dist.FileStore(str(folder / "store"), size), rank, size, limit=SECONDS)
        torch.save(job(ranks, *arguments), folder / f"{rank}.pt")
        ranks.same("end", "")  # nobody leaves while another still reads
        os._exit(0)  # some tests leave a process group that cannot be taken down in order
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None
