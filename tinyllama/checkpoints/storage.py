"""How a model keeps its matrices in memory: exactly as it computes, or in fewer bits for speed.

This is the one place that imports `tinyllama.fast`. Where that folder is missing, weights stay exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinyllama.errors import InputError
from tinyllama.model import Llama, RMSNorm, Step
from tinyllama.progress import note

if TYPE_CHECKING:
    from tinyllama.fast.claims import Claim

try:
    from tinyllama.fast import build, compiler, graph, libraries, linear, native, norm, threads

    HAS_FAST = True
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("tinyllama.fast"):
        raise
    HAS_FAST = False

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("exact", "stored", *FLOATS, "int8")


@dataclass(frozen=True)
class Storage:
    """What becomes of a checkpoint's tensors.

    Attributes:
        kind: see `load_model`.
        dtype: of the activations.
    """

    kind: str
    dtype: torch.dtype

    @staticmethod
    def of(kind: str, dtype: torch.dtype, device: torch.device) -> Storage:
        """That kind; for "stored", which asks for speed alone, "exact" where there is none to be had.

        Raises:
            InputError: there is no such kind, or it needs the folder fast/, which is missing.
        """
        if kind not in KINDS:
            raise InputError(f"weights: expected one of {', '.join(KINDS)}, got {kind!r}")
        if not HAS_FAST and kind not in ("exact", "stored"):
            raise InputError(f"weights: {kind} needs the folder tinyllama/fast, which is missing; use exact")
        if kind == "stored" and (device.type != "cpu" or dtype == torch.float64 or not _has_compiler()):
            kind = "exact"
        return Storage(kind, dtype)

    def dtype_of(self, stored: torch.dtype) -> torch.dtype:
        """What a matrix is read as."""
        if self.kind == "exact":
            return self.dtype
        if self.kind in FLOATS:
            return FLOATS[self.kind]
        return min(self.dtype, stored, key=lambda dtype: dtype.itemsize)

    def itemsize(self, stored: torch.dtype) -> float:
        """Bytes that a weight of a matrix takes in memory."""
        return 1 + 2 / build.GROUP if self.kind == "int8" else self.dtype_of(stored).itemsize

    def linear(self, weight: Tensor) -> nn.Module:
        """The layer that keeps such a matrix.

        Raises:
            InputError: for "int8", its rows cannot be divided into groups.
        """
        if self.kind != "int8":
            return linear.FastLinear(weight)
        if weight.shape[1] % build.GROUP:
            raise InputError(
                f"weights: int8 needs rows that are a multiple of {build.GROUP}, got {weight.shape[1]}; "
                "use stored"
            )
        return linear.Int8Linear(*linear.quantise(weight))

    def claims(self, stored: Iterable[torch.dtype]) -> list[Claim]:
        """The faster code that a model on the CPU uses, whose matrices have those dtypes in the file."""
        if not HAS_FAST:
            return []
        if self.kind == "exact":
            return [linear.split_claim()] if self.dtype.itemsize >= 4 else []
        if self.dtype == torch.float64:
            return []
        kept = {torch.int8} if self.kind == "int8" else {self.dtype_of(dtype) for dtype in stored}
        found = [linear.claim(dtype, linear.compute_dtype(self.dtype)) for dtype in sorted(kept, key=str)]
        if self.dtype in native.ACTIVATIONS:
            found.append(norm.claim(self.dtype))
        return found


def start(claims: list[Claim]) -> None:
    """Begin to compile what the claims need, and say so if it is not there yet; does not wait."""
    builds = [claim.build for claim in claims if claim.build is not None]
    try:
        for one in builds:
            one.start()
    except libraries.BuildError:
        return  # the claims will say it
    if not all(one.code for one in builds):
        note("compiling matrix products and norms for this processor; it is done once")


def speed_up(model: Llama, claims: list[Claim], all_threads: bool) -> None:
    """Let a model on the CPU use the faster code whose claims hold, checked now and at each generation.

    Args:
        model: the model.
        claims: see `Storage.claims`.
        all_threads: whether all threads compute every token, also where some come late: for bits that may
            depend on their number, and on a rank, whose waiting for other ranks would look like late threads.
    """
    if not claims:
        return
    for module in model.modules():
        if type(module) is nn.Linear and linear.split_claim() in claims:
            module.__class__ = linear.SplitLinear
        if type(module) is RMSNorm and any(norm.claim(one) in claims for one in native.ACTIVATIONS):
            module.__class__ = norm.FastRMSNorm
    end = time.monotonic() + build.WAIT_SECONDS
    for claim in claims:
        claim.check(wait=max(0.0, end - time.monotonic()))

    def supervise(steps: Iterator[Step]) -> Iterator[Step]:
        checked = chain(_checks(claims), steps)
        return checked if all_threads else threads.team.steps(checked)

    model.supervise = supervise  # type: ignore[method-assign]


def record_steps(model: Llama) -> None:
    """Let the model, on a GPU, take decode steps from a recording; see `fast.graph`.

    Raises:
        InputError: the model is on a CPU, or the folder fast/ is missing.
    """
    if not HAS_FAST:
        raise InputError("graph: needs the folder tinyllama/fast, which is missing; leave it out")
    device = model.embed_tokens.weight.device
    if device.type != "cuda":
        raise InputError(f"graph: expected a model on cuda, got one on {device}; leave it out")
    graph.record_steps(model)


def _checks(claims: list[Claim]) -> Iterator[Any]:
    """Check the claims when the first step is asked for; no step of its own."""
    for claim in claims:
        claim.check()
    yield from ()


def _has_compiler() -> bool:
    if not HAS_FAST:
        note("weights stay exact: the folder tinyllama/fast is missing")
        return False
    try:
        compiler.compiler()
    except libraries.BuildError as error:
        note(f"weights stay exact, at half the speed or less: {error}")
        return False
    return True
