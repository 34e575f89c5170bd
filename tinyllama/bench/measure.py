"""The measurement: every peer in turn, round by round, so that the machine's other work slows all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from tinyllama.bench.figures import Figure, Taken, seconds
from tinyllama.bench.loads import measure_loads
from tinyllama.bench.on_ranks import OnRanks
from tinyllama.bench.peers import ON_RANKS, Peer, Setup, make_peer
from tinyllama.bench.results import PeerResult, Rate, Results, Run
from tinyllama.device import usable_device
from tinyllama.errors import InputError
from tinyllama.progress import step_progress

if TYPE_CHECKING:
    from tinyllama.parallel.ranks import Ranks

READ_BYTES = 1_000_000_000  # more than a processor's caches hold
# Rows, inner size and outer size of the large product: TinyLlama's up projection in a long prefill.
PRODUCT, GPU_PRODUCT = (1024, 2048, 5632), (8192, 8192, 8192)
DTYPES = ("float32", "bfloat16")
PASSES = 3
# Spins until the process that started it is gone, should that be killed.
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@dataclass(frozen=True)
class Plan:
    """How much is measured; 0 leaves loads, the prefill or the batch out."""

    rounds: int  # that count; one more comes first, as warm-up
    load_rounds: int
    steps: int  # decode steps in each measurement
    contexts: Sequence[int]  # tokens before these steps
    prefill: int  # tokens of the prompt
    rows: int  # texts in the batch

    @property
    def longest(self) -> int:
        """Tokens of the longest text; the first decode step, which may prepare the others, is not timed."""
        return max(max(self.contexts) + self.steps + 2, self.prefill, self.rows)

    @property
    def figures(self) -> list[Figure]:
        """What is measured of each peer."""
        others = [("prefill of", self.prefill), ("batch of", self.rows)]
        return [
            *(Figure("decode at", context) for context in self.contexts),
            *(Figure(kind, size) for kind, size in others if size),
        ]


class Limits:
    """What the machine itself can do: read memory, and multiply large matrices."""

    def __init__(self, device: str, read_bytes: int = 0, product: tuple[int, int, int] | None = None) -> None:
        self.cuda = usable_device(device).type == "cuda"
        self.device, self.product = device, product or (GPU_PRODUCT if self.cuda else PRODUCT)
        self.values = torch.ones((read_bytes or READ_BYTES) // 4, device=device)

    def read_bandwidth(self) -> float:
        """Bytes a second that a sum over a large array reads."""
        return self.values.nbytes / median(self._seconds(self.values.sum) for _ in range(PASSES))

    def product_rate(self, dtype: str) -> float:
        """Floating-point operations a second of PyTorch's product in that dtype; a multiply-add is two."""
        rows, inner, outer = self.product
        x, w = (torch.ones(n, inner, dtype=getattr(torch, dtype), device=self.device) for n in (rows, outer))
        return 2 * rows * inner * outer / min(self._seconds(lambda: F.linear(x, w)) for _ in range(PASSES))

    def _seconds(self, action: Callable[[], object]) -> float:
        def finished() -> None:
            action()
            if self.cuda:
                torch.cuda.synchronize()

        return seconds(finished)


@contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep that many other processes computing, as other programs on a laptop do."""
    spinners: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            spinners.append(subprocess.Popen([sys.executable, "-c", SPIN]))
        yield spinners
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def load_peers(
    names: Sequence[str], setup: Setup, ranks: Ranks | None = None
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that could be loaded, and for the others the reason why not.

    Raises:
        InputError: no peer could be loaded, or the ranks refuse what they should share.
    """
    peers: list[Peer] = []
    left_out = {}
    with step_progress(len(names)) as step:
        for name in names:
            try:
                if ranks is not None and name in ON_RANKS:
                    peer: Peer = OnRanks(name, setup, ranks)
                else:
                    peer = make_peer(name, setup)
                peer.load()
                peers.append(peer)
            except InputError as error:
                if name in ON_RANKS:  # the other ranks end, too
                    raise
                left_out[name] = str(error)
            step(f"load {name}")
    if not peers:
        raise InputError(f"peers: none can be measured: {'; '.join(left_out.values())}")
    return peers, left_out


@dataclass(frozen=True)
class Rounds:
    """One value for each round."""

    taken: dict[str, dict[Figure, list[Taken]]]  # by peer
    read: list[float]  # bytes a second, beside each figure
    products: dict[str, list[float]]  # floating-point operations a second by dtype


def interleave(peers: Sequence[Peer], plan: Plan, limits: Limits) -> Rounds:
    """In each round measure each figure of each peer, and the machine's limits beside them."""
    with step_progress((plan.rounds + 1) * len(plan.figures)) as step:
        for turn in range(plan.rounds + 1):
            if turn < 2:  # what the first round gave is dropped: it warms up
                found = Rounds({peer.name: {} for peer in peers}, [], {dtype: [] for dtype in DTYPES})
            for dtype, rates in found.products.items():
                rates.append(limits.product_rate(dtype))
            for figure in plan.figures:
                found.read.append(limits.read_bandwidth())
                for peer in peers:
                    if peer.batches or figure.kind != "batch of":
                        if isinstance(peer, OnRanks):
                            taken = peer.measure(figure, plan.steps)
                        else:
                            taken = figure.measure(peer, plan.steps)
                        found.taken[peer.name].setdefault(figure, []).append(taken)
                step(f"{figure}, round {turn} of {plan.rounds}" if turn else f"{figure}, warm-up")
    return found


def measure_speeds(
    run: Run, names: Sequence[str], setup: Setup, plan: Plan, limits: Limits, ranks: Ranks | None = None
) -> Results:
    """Load the peers, and measure their speeds and then their loads, in turn.

    With ranks this is for rank 0; see `on_ranks`.
    """
    peers, left_out = load_peers(names, setup, ranks)
    rounds = interleave(peers, plan, limits)
    loads = measure_loads([peer.name for peer in peers], setup, plan.load_rounds)
    bandwidth = Rate.of(rounds.read)
    results = []
    for peer in peers:
        taken = {str(figure): values for figure, values in rounds.taken[peer.name].items()}
        speeds = {figure: Rate.of([one.speed for one in values]) for figure, values in taken.items()}
        shares = {}
        for context in plan.contexts:
            figure, size = str(Figure("decode at", context)), peer.weight_bytes + context * peer.cached_bytes
            shares[figure] = speeds[figure].median * size / bandwidth.median
        threads, sharing = setup.threads, None
        if isinstance(peer, OnRanks):
            threads, sharing = peer.threads, peer.sharing(taken)
        results.append(PeerResult(peer.name, threads, speeds, shares, loads.get(peer.name), sharing))
    products = {dtype: Rate.of(rates) for dtype, rates in rounds.products.items()}
    return Results(run, bandwidth, products, left_out, peers=results)
