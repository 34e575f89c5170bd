"""The figures of a peer, and how one is measured."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyllama.bench.peers import Peer


@dataclass(frozen=True)
class Taken:
    """What one measurement found."""

    speed: float  # tokens a second
    # Of a model that ranks share:
    in_collectives: Sequence[float] = ()  # share of the time, waiting included, by rank
    received: float = 0.0  # bytes a token that a rank received


@dataclass(frozen=True)
class Figure:
    """One figure of every peer: "decode at" a context, "prefill of" a prompt, or "batch of" some texts."""

    kind: str
    size: int

    def __str__(self) -> str:
        """`decode at 1,900`."""
        return f"{self.kind} {self.size:,}"

    def measure(self, peer: Peer, steps: int) -> Taken:
        """Measure it once, with that many decode steps."""
        tokens, compute = self.prepare(peer, steps)
        return Taken(tokens / seconds(compute))

    def prepare(self, peer: Peer, steps: int) -> tuple[int, Callable[[], object]]:
        """How many tokens are timed, and what computes them; what comes before is done here."""
        if self.kind == "prefill of":
            return self.size, lambda: peer.prefill(self.size)
        if self.kind == "batch of":
            return self.size * steps, lambda: peer.batch(self.size, steps)
        tokens = peer.decode(self.size, steps + 2)
        next(tokens), next(tokens)
        return steps, lambda: deque(tokens, maxlen=0)


def seconds(action: Callable[[], object]) -> float:
    """How long the action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
