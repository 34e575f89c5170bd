"""Our model on several ranks, as a peer: rank 0 measures, and tells the others what all of them do next.

Until then the others wait, and leave the processor to rank 0 and the peers that it measures in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from tinyllama import load_model, resolve
from tinyllama.bench.figures import Figure, Taken, seconds
from tinyllama.bench.peers import Setup, cached_bytes, random_ids
from tinyllama.bench.results import Sharing
from tinyllama.bench.torch_peers import Ours, weight_bytes
from tinyllama.parallel.plan import Plan
from tinyllama.parallel.ranks import Ranks


class OnRanks(Ours):
    """Our model, shared by all ranks; the name is the weight mode and the split: "stored-fast"."""

    def __init__(self, name: str, setup: Setup, ranks: Ranks) -> None:
        super().__init__(name, setup)
        self.ranks, self.threads = ranks, setup.threads // setup.ranks_here
        self.weights, self.split = name.split("-")

    def load(self) -> None:
        """Load each rank's part, on all ranks."""
        self._tell()
        setup = self.setup
        with threads(self.threads):
            self.model = load_model(
                setup.folder,
                device=setup.device,
                dtype=setup.dtype,
                weights=self.weights,
                ranks=self.ranks,
                split=self.split,
                pipeline=setup.pipeline,
            )
        config = self.model.config
        self.ids = random_ids(setup, config)
        found = self._of_every_rank(weight_bytes(self.model), self.ranks.traffic.bytes_read)
        self.bytes_read = [int(read) for _, read in found]
        # Of all ranks on this machine, for the bandwidth is the machine's.
        self.weight_bytes = sum(int(size) for size, _ in found[: setup.ranks_here])
        plan = Plan.of(config, self.ranks.size, self.split, setup.pipeline)
        heads = sum(
            len(plan.kv_heads[rank % plan.each]) * len(plan.layers[plan.stage(rank)])
            for rank in range(setup.ranks_here)
        )
        whole = cached_bytes(config, getattr(torch, setup.dtype).itemsize)
        self.cached_bytes = whole * heads // (config.num_key_value_heads * config.num_hidden_layers)
        self._part()

    def measure(self, figure: Figure, steps: int) -> Taken:
        """Measure a figure once, on all ranks."""
        self._tell(figure.kind, figure.size, steps)
        traffic = self.ranks.traffic
        with threads(self.threads):
            tokens, compute = figure.prepare(self, steps)
            self._of_every_rank()  # all begin together, though the others learn of it some milliseconds late
            waited, received = traffic.seconds, traffic.received
            passed = seconds(compute)
            waited, received = traffic.seconds - waited, traffic.received - received
            shares = [share for (share,) in self._of_every_rank(waited / passed)]
        self._part()
        return Taken(tokens / passed, shares, received / tokens)

    def sharing(self, found: Mapping[str, Sequence[Taken]]) -> Sharing:
        """What sharing cost, by figure: medians of the rounds."""
        return Sharing(
            self.ranks.size,
            self.split,
            self.bytes_read,
            {
                figure: [
                    median(shares) for shares in zip(*(one.in_collectives for one in rounds), strict=True)
                ]
                for figure, rounds in found.items()
            },
            {figure: median(taken.received for taken in rounds) for figure, rounds in found.items()},
        )

    def _tell(self, *figure: str | int) -> None:
        """Have the others do this too; see `serve`. They come here themselves by doing it."""
        if self.ranks.rank == 0:
            self.ranks.share(lambda: [self.name, *figure])

    def _part(self) -> None:
        """From here on rank 0 computes alone, and Ctrl-C ends it at once."""
        self.ranks.share(lambda: None)

    def _of_every_rank(self, *values: float) -> list[list[float]]:
        own = torch.tensor([0.0, *values], dtype=torch.float64, device=self.ranks.device)
        return [found[1:].tolist() for found in self.ranks.gather(own, [len(own)] * self.ranks.size)]


@contextmanager
def directing(ranks: Ranks, setup: Setup) -> Iterator[None]:
    """On rank 0: within, the others do what its `OnRanks` do; afterwards they may end."""
    ranks.share(lambda: asdict(setup))
    yield
    ranks.share(lambda: None)


def serve(ranks: Ranks, model: str | None) -> None:
    """On all ranks but 0: do what rank 0 says, until it has finished.

    Args:
        ranks: this process among the others.
        model: the name to resolve, as each machine has folders of its own; None for rank 0's folder.
    """
    setup = Setup(**_said(ranks))
    if model is not None:
        setup = replace(setup, folder=str(resolve(model)))
    peers: dict[str, OnRanks] = {}
    while order := _said(ranks):
        name, *figure = order
        if figure:
            kind, size, steps = figure
            peers[name].measure(Figure(kind, size), steps)
        else:
            peers[name] = OnRanks(name, setup, ranks)
            peers[name].load()


def _said(ranks: Ranks) -> Any:
    """What rank 0 says."""
    return ranks.share(lambda: None)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with that many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
