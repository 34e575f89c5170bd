"""The processes that compute one model together: what they send each other, and how they end.

Everything goes through torch.distributed: gloo between CPUs, NCCL between GPUs. A store (a small table of
names and texts that all ranks can read) serves for what happens once: the handshake, and the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import tinyllama
from tinyllama.checkpoints.headers import StoredTensor
from tinyllama.errors import InputError
from tinyllama.parallel.plan import Parts, owners

Value = TypeVar("Value")

SECONDS = 300.0  # how long a rank waits for the others, at each collective
PRECEDENCE = 0.5  # seconds in which rank 0 may say what all ranks have to say
LOOK = 0.01  # seconds between two looks into the store
SAMPLE = 512  # bytes of each tensor that tell checkpoints apart
STOP = -1  # in place of an id: Ctrl-C


class RankError(RuntimeError):
    """Another rank ended, or did not answer in time."""


class RankEndedError(RankError):
    """Another rank ended: it said why, or was killed."""

    def __init__(self) -> None:
        super().__init__("ranks: another rank ended; look at what it said, and start again")


class Ranks:
    """One process among those that compute a model together.

    Attributes:
        rank: its number; rank 0 prints, and its choice of the next id counts.
        size: how many there are.
        received: bytes that came from other ranks.
        bytes_read: of the weight files, by this rank.
        seconds: time spent in collectives, waiting included. On a GPU it is the time to start them.

    Args:
        store: where all ranks meet, for example `torch.distributed.FileStore(path, size)`.
        rank: see above.
        size: see above.
        backend: "gloo" or "nccl".
        limit: seconds that a rank waits for the others before it gives up.

    Raises:
        RankError: the others did not come.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, *, backend: str = "gloo", limit: float = SECONDS
    ) -> None:
        self.rank, self.size, self.limit = rank, size, limit
        self.received, self.bytes_read, self.seconds = 0, 0, 0.0
        self._store, self._turns = dist.PrefixStore("tinyllama", store), 0
        self._busy = False  # whether the ranks compute, so that none may leave alone
        self._stopped = False  # whether Ctrl-C came meanwhile
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        self._talk(
            lambda: dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit)
            )
        )

    @staticmethod
    def from_environment(backend: str = "gloo", limit: float = SECONDS) -> Ranks:
        """The ranks that torchrun started.

        Raises:
            InputError: torchrun did not start this process.
            RankError: the others did not come.
        """
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
        except ValueError as error:
            raise InputError(f"ranks: start the script by torchrun ({error})") from error
        except RuntimeError as error:
            raise RankError(
                f"ranks: the others did not come within {limit:g} s; start all of them"
            ) from error
        return Ranks(store, rank, size, backend=backend, limit=limit)

    def __str__(self) -> str:
        """For a line of statistics."""
        return (
            f"{self.size}; this one read {self.bytes_read / 1e6:,.0f} MB of weights, received "
            f"{self.received / 1e6:,.1f} MB, and was {self.seconds:.1f} s in collectives"
        )

    # What is sent in every pass

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Every rank's x, in order; rank r's is (..., widths[r]).

        Bytes are sent, so every dtype arrives as it is. Narrow parts are filled up to the widest, because
        neither gloo nor NCCL gathers uneven ones in one call.

        Gradients are not sent: what comes out has none.

        Raises:
            RankError: a rank ended or is late.
        """
        self._busy = True
        padded = F.pad(x.detach(), (0, max(widths) - x.shape[-1])).contiguous()
        sent = padded.flatten().view(torch.uint8)
        every = torch.empty(self.size, len(sent), dtype=torch.uint8, device=x.device)
        self._talk(lambda: dist.all_gather(list(every), sent))
        self.received += (self.size - 1) * len(sent)
        parts = every.view(x.dtype).view(self.size, *padded.shape)
        return [part[..., :width] for part, width in zip(parts, widths, strict=True)]

    def join(self, x: Tensor, parts: Parts) -> Tensor:
        """All channels, (..., n), of which rank r has `parts[r]`; replicas count once."""
        every = self.gather(x, [len(part) for part in parts])
        return torch.cat([every[rank] for rank in owners(parts)], dim=-1)

    def agree(self, chosen: Tensor) -> Tensor:
        """The ids that rank 0 chose, (B,), on every rank; see `Llama.agree`.

        Raises:
            KeyboardInterrupt: on every rank, if rank 0 had Ctrl-C during the pass.
            RankError: a rank ended or is late.
        """
        if self._stopped:
            chosen = torch.full_like(chosen, STOP)
        self._talk(lambda: dist.broadcast(chosen, src=0))
        if (chosen == STOP).any():
            self._busy = self._stopped = False
            raise KeyboardInterrupt
        return chosen

    def _talk(self, send: Callable[[], object]) -> None:
        start = time.perf_counter()
        try:
            send()
        except RuntimeError as error:
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise RankError(f"ranks: another rank did not answer within {self.limit:g} s") from error
            raise RankEndedError from error
        self.seconds += time.perf_counter() - start

    # What happens once

    def same(self, what: str, value: str) -> None:
        """Go on when all ranks have said the same of `what`; also waits for all of them.

        Raises:
            InputError: they have not; on every rank, with the same message.
            RankError: a rank ended or is late.
        """
        values = self._exchange(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"ranks: expected the same {what} on all of them, got {values[0]:.200} on rank 0 and "
                    f"{other:.200} on rank {rank}; start them alike, from the same files"
                )

    def share(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, on every rank; JSON must be able to write it.

        The others wait as long as rank 0 is there: it may wait for somebody who types.

        Raises:
            KeyboardInterrupt: on rank 0, if it had Ctrl-C meanwhile.
            RankError: another rank ended.
        """
        stopped, self._busy, self._stopped = self._stopped, False, False
        if stopped:
            raise KeyboardInterrupt
        turn = self._turn()
        if self.rank > 0:
            return json.loads(self._get(turn, 0, math.inf))
        value = make()
        self._store.set(turn, json.dumps(value))
        return value

    def _exchange(self, value: str) -> list[str]:
        """What every rank says, in order."""
        turn, end = self._turn(), time.monotonic() + self.limit
        self._store.set(f"{turn}/{self.rank}", value)
        return [self._get(f"{turn}/{rank}", rank, end) for rank in range(self.size)]

    def _turn(self) -> str:
        """A name for this exchange; every rank counts alike."""
        self._turns += 1
        return f"turn {self._turns}"

    def _get(self, key: str, rank: int, end: float) -> str:
        while not self._store.check([key]):  # not wait(): it writes to stderr when its time is over
            if self._store.check(["ended"]):
                raise RankEndedError
            if time.monotonic() > end:
                raise RankError(f"ranks: rank {rank} did not answer within {self.limit:g} s")
            time.sleep(LOOK)
        return self._store.get(key).decode()

    # The end

    def defer_interrupts(self) -> None:
        """While the ranks compute, let Ctrl-C wait for the next id: then it ends the text on all of them."""

        def interrupt(*_: object) -> None:
            if not self._busy or self._stopped:  # nobody waits twice
                raise KeyboardInterrupt
            self._stopped = True

        signal.signal(signal.SIGINT, interrupt if self.rank == 0 else signal.SIG_IGN)

    def ends(self, alike: bool) -> bool:
        """Tell the others that this rank ends early; whether it is the one to say why.

        The first to end speaks. Where they may all fail alike, as on bad input, rank 0 goes first.
        """
        try:
            end = time.monotonic() + (PRECEDENCE if self.rank > 0 and alike else 0)
            while time.monotonic() < end and not self._store.check(["ended"]):
                time.sleep(LOOK)
            return self._store.add("ended", 1) == 1
        except RuntimeError:  # the store went with its rank
            return self.rank == 1


def code_version() -> str:
    """A digest of PyTorch's version and of all code in this package."""
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(tinyllama.__file__).parent
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def checkpoint_version(config: Path, stored: dict[str, StoredTensor]) -> str:
    """A digest of config.json, and of each tensor's name, dtype, shape and first bytes."""
    from safetensors import safe_open

    digest = hashlib.sha256(config.read_bytes())
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        with safe_open(tensor.path, framework="pt") as file:
            first = file.get_slice(tensor.key)[:1]
        digest.update(first.flatten()[:SAMPLE].contiguous().view(torch.uint8).numpy().tobytes()[:SAMPLE])
    return digest.hexdigest()[:12]
