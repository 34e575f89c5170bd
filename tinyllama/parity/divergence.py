"""Where do two computations part? The first address whose value is off by more than rounding explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.parity.measure import CEILING
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import Right, config_fields
from tinyllama.parity.scene import Scene, relative_error
from tinyllama.parity.suspects import suspect
from tinyllama.parity.trace import Trace, operations, stages

# What runs one text and gives the values at the addresses asked for. An address that is absent from its
# answer is not looked at; None says that the computation never came there.
Run = Callable[[Sequence[int], Iterable[str]], Trace]

# Scores this low are masked: float16's lowest number is the highest mask value in use.
MASKED = -6e4
# Beyond this many times the reference's own error, a value is wrong.
FACTOR = 2.0


@dataclass(frozen=True)
class Step:
    """One address in the order of the computation: relRMS against the oracle, ours and the reference's."""

    address: str
    error: float
    reference: float
    limit: float


@dataclass(frozen=True)
class Divergence:
    """The first value that is wrong.

    Attributes:
        address: its module path.
        error: its relRMS against the oracle; inf for another shape or mask, or where it was never computed.
        reference: the reference's relRMS there; NaN where it has no such value.
        limit: the most that rounding explains.
        shape: of the value; () where it was never computed.
        place: index of the largest error.
        got: the value there.
        expected: the oracle's.
        theirs: the reference's.
        suspect: the mistake that explains the value, or None.
        path: every address compared on the way, this one last.
    """

    address: str
    error: float
    reference: float
    limit: float
    shape: tuple[int, ...]
    place: tuple[int, ...]
    got: float
    expected: float
    theirs: float
    suspect: str | None
    path: tuple[Step, ...]

    def __str__(self) -> str:
        """In a few lines."""
        lines = [f"first divergence: {self.address}, shape {self.shape}"]
        if self.shape:
            lines.append(
                f"relRMS {self.error:.2e}, over {self.limit:.2e} (the reference: {self.reference:.2e}); at "
                f"{list(self.place)} got {self.got:.9g}, expected {self.expected:.9g}, "
                f"the reference has {self.theirs:.9g}"
            )
        lines.append(f"suspect: {self.suspect or 'none that is known'}")
        return "\n".join(lines)


def bisect(
    run: Run,
    right: Right,
    ids: Sequence[int],
    references: Sequence[Run] = (),
    truth: Run | None = None,
) -> Divergence | None:
    """Find the first divergence from the truth: first the layer, then the operation in it.

    Args:
        run: the computation in question; see `our_trace`, or write your own.
        right: has the right config and weights; their dtype is the one under test.
        ids: the text.
        references: right computations, whose error is what rounding explains; see `reference_run`. Without
            one, an absolute limit takes its place.
        truth: the computation in float64; None is the oracle.

    Returns:
        None where every block's output is within twice the reference's error.
    """
    config, weights = config_fields(right.config), right.state_dict()
    dtype = right.dtype

    def oracle(ids: Sequence[int], addresses: Iterable[str]) -> Trace:
        trace: Trace = dict.fromkeys(addresses)
        oracle_logits(config, weights, ids, trace)
        return trace

    def values(addresses: list[str]) -> _Values:
        true, ours, *theirs = (
            {address: _masked(address, value) for address, value in one(ids, addresses).items()}
            for one in (truth or oracle, run, *references)
        )
        return _Values(true, ours, theirs)

    blocks = stages(right.config.num_hidden_layers)
    path: list[Step] = []
    outer = values(blocks)
    stage = _first_wrong(blocks, outer, dtype, path)
    if stage is None:
        return None
    before = blocks[: blocks.index(stage)][-1:]
    inside = [stage]
    if stage.startswith("layers.") and outer.ours[stage] is not None:
        inside = [*operations(int(stage.removeprefix("layers."))), stage]
    inner = values([*before, *inside])
    address = _first_wrong(inside, inner, dtype, path) or stage
    return _divergence(address, inner, path, Scene(address, inner.seen(before), config, weights, ids))


@dataclass(frozen=True)
class _Values:
    """The same addresses in the oracle, in the computation in question, and in the references."""

    truth: Trace
    ours: Trace
    theirs: list[Trace]

    def seen(self, before: list[str]) -> dict[str, Tensor]:
        """Our values in float64; what went in is "input"."""
        return {
            "input" if address in before else address: value.to(torch.float64)
            for address, value in self.ours.items()
            if value is not None
        }

    def expected(self, address: str) -> Tensor:
        """The oracle's value."""
        value = self.truth[address]
        assert value is not None, f"the truth has no {address}"
        return value

    def references(self, address: str) -> list[Tensor]:
        """The value in each reference that has it."""
        return [value for trace in self.theirs if (value := trace.get(address)) is not None]


def _first_wrong(addresses: list[str], values: _Values, dtype: torch.dtype, path: list[Step]) -> str | None:
    """The first address over its limit; notes on `path` how far each one up to it is off."""
    for address in addresses:
        # A fused kernel has neither scores nor pattern.
        optional = address.endswith((".scores", ".pattern"))
        both = (values.ours.get(address), values.truth[address])
        if address not in values.ours or (optional and None in both):
            continue
        ours, expected = values.ours[address], values.expected(address)
        errors = [relative_error(value, expected) for value in values.references(address)]
        worst = max(errors, default=math.nan)
        # Without a reference, and in float64 (where transformers keeps float32 norms), an absolute limit.
        limit = CEILING[dtype] if dtype == torch.float64 or not errors else FACTOR * worst
        error = math.inf if ours is None else relative_error(ours, expected)
        path.append(Step(address, error, worst, limit))
        if error > limit:
            return address
    return None


def _divergence(address: str, values: _Values, path: list[Step], scene: Scene) -> Divergence:
    step = path[-1]
    got, expected = values.ours[address], values.expected(address)
    place: tuple[int, ...] = ()
    numbers = [math.nan] * 3
    if got is not None and got.shape == expected.shape:
        place = _largest_error(got.to(torch.float64), expected)
        theirs = values.references(address)
        numbers = [got[place].item(), expected[place].item(), theirs[0][place].item() if theirs else math.nan]
    return Divergence(
        address=address,
        error=step.error,
        reference=step.reference,
        limit=step.limit,
        shape=() if got is None else tuple(got.shape),
        place=place,
        got=numbers[0],
        expected=numbers[1],
        theirs=numbers[2],
        suspect=f"{address} is skipped" if got is None else suspect(scene),
        path=tuple(path),
    )


def _masked(address: str, value: Tensor | None) -> Tensor | None:
    """Scores with -inf where they are masked, whatever low number stands there."""
    if value is None or not address.endswith(".scores"):
        return value
    return value.masked_fill(value < MASKED, -math.inf)


def _largest_error(got: Tensor, expected: Tensor) -> tuple[int, ...]:
    """Where they differ most; where the masks differ, there."""
    # -inf less -inf, where both are masked, is NaN; and so is NaN less anything.
    error = torch.where(got == expected, 0.0, (got - expected).abs().nan_to_num(nan=math.inf))
    return tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
