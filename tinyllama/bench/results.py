"""What a run of the benchmark found; the JSON file, the table and the chart are views of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True)
class Rate:
    """Something per second, such as tokens, measured once a round."""

    median: float
    slowest: float
    fastest: float
    spread: float  # half the distance between the quartiles, as a share of the median
    rounds: Sequence[float]

    @staticmethod
    def of(rounds: Sequence[float]) -> Rate:
        """The rate with these values, at least one."""
        low, _, high = quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else [0.0] * 3
        middle = median(rounds)
        return Rate(middle, min(rounds), max(rounds), (high - low) / 2 / middle, list(rounds))


@dataclass(frozen=True)
class Load:
    """From the checkpoint's files to a first token, in a process of its own.

    The token counts because a mapped file is read when its weights are used.
    """

    seconds: float  # since just before the load
    with_imports: float  # seconds since before the libraries were imported
    peak_bytes: int | None  # over what the imports took; None where the system does not say


@dataclass(frozen=True)
class Sharing:
    """What it costs to share a model among ranks; medians of the rounds."""

    ranks: int
    split: str
    bytes_read: Sequence[int]  # of the weight files, by rank
    # By figure, each rank's share of the time, waiting included; on a GPU, of the time to start them.
    in_collectives: Mapping[str, Sequence[float]]
    received: Mapping[str, float]  # by figure, bytes a token that each rank received


@dataclass(frozen=True)
class PeerResult:
    """One peer's figures; the keys are "decode at 64", "prefill of 512", "batch of 8"."""

    name: str  # one of peers.NAMES or peers.ON_RANKS
    threads: int  # of each process
    speeds: Mapping[str, Rate]  # tokens a second
    # Of decode figures: the bytes that a second's steps must read, over the machine's read bandwidth.
    bandwidth_shares: Mapping[str, float]
    load: Load | None
    sharing: Sharing | None = None  # where ranks share the model


@dataclass(frozen=True)
class Operation:
    """One kind of operation in a decode step, over all layers."""

    name: str
    seconds: float  # in one step
    bytes: int  # of weights, keys and values that it must read


@dataclass(frozen=True)
class Profile:
    """Where the time of one peer's decode step goes."""

    peer: str
    context: int  # tokens before the step
    seconds: float  # of a step that nothing watches
    watched_seconds: float  # of a step with a clock around its operations, which sum to this
    operations: Sequence[Operation]


@dataclass(frozen=True)
class Run:
    """What was run, and on what."""

    command: str
    machine: Mapping[str, Any]  # `tinyllama.device.machine`, and the version of llama-cpp-python
    model: str
    parameters: int
    device: str
    dtype: str  # of our model's activations
    busy: int  # other processes that used the processor meanwhile

    def __str__(self) -> str:
        """Machine and model on one line."""
        processor = self.machine["cpu" if self.device == "cpu" else "gpu"]
        model = f"{self.model}, {self.parameters / 1e6:,.0f} million parameters, {self.dtype} activations"
        busy = f"; beside {self.busy} busy processes" if self.busy else ""
        return f"{processor}, {self.machine['threads']} threads; {model}{busy}"


@dataclass(frozen=True)
class Results:
    """All of a run: speeds, or profiles."""

    run: Run
    bandwidth: Rate  # bytes a second that the machine reads from memory
    products: Mapping[str, Rate]  # by dtype, floating-point operations a second of a large matrix product
    left_out: Mapping[str, str]  # by peer, the reason
    peers: Sequence[PeerResult] = field(default_factory=list)
    profiles: Sequence[Profile] = field(default_factory=list)

    @property
    def figures(self) -> list[str]:
        """The figures that any peer has, in the order in which they were measured."""
        return list(dict.fromkeys(figure for peer in self.peers for figure in peer.speeds))
