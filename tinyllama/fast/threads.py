"""How many threads compute a token: all, or one while the system lets others come late.

A token is hundreds of short parallel regions, in PyTorch and in csrc/, and each ends when its last thread is
done. A busy machine may put a thread aside for milliseconds, many times as long as a region takes: with two
other programs at work on two cores, waiting took nine tenths of the time. One thread waits for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Step = TypeVar("Step")

LATE = 0.2  # share of the time in which the calling thread did not compute, from which on others are late
TRY = 0.004  # seconds of short regions that show whether threads come in time
SHORTEST, LONGEST = 0.25, 8.0  # seconds that one thread works alone before the next try; doubled if it fails
REGION = 32768  # numbers for which PyTorch takes one more thread


class Team:
    """Whether all threads compute; it remembers what it saw from one token to the next.

    Args:
        clock: the time, in seconds.
        computed: the seconds for which the calling thread has computed.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        computed: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock, self._computed = clock, computed
        self._alone_until = -1.0
        self._pause = SHORTEST

    def steps(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps, each computed by as many threads as come in time."""
        self._try()
        while True:
            with self.at_work():
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, as many threads compute as came in time lately; afterwards as many as before."""
        threads = torch.get_num_threads()
        if self._clock() > self._alone_until and self._pause > SHORTEST:
            self._try()
        if threads == 1 or self._clock() > self._alone_until:
            with self._watched():
                yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _try(self) -> None:
        """Find out by work that matters to nobody."""
        work = torch.zeros(REGION * torch.get_num_threads())
        with self._watched():
            end = self._clock() + TRY
            while self._clock() < end:
                work.add_(1)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        start, computed = self._clock(), self._computed()
        yield
        end = self._clock()
        lost = (end - start) - (self._computed() - computed)
        if lost > LATE * (end - start):
            self._alone_until = end + self._pause
            self._pause = min(2 * self._pause, LONGEST)
        else:
            self._pause = max(self._pause / 2, SHORTEST)


team = Team()
