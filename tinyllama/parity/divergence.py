"""Where two computations part: the first value that is off by more than rounding explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tinyllama.advice import did_you_mean
from tinyllama.errors import InputError
from tinyllama.parity.measure import CEILING
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import Right, config_fields
from tinyllama.parity.scene import Scene, relative_error
from tinyllama.parity.suspects import suspect
from tinyllama.parity.trace import Trace, operations, stages

# A function that runs one text and gives the values at the addresses asked for. An address that is absent
# from its answer is not compared; None says that the computation never came there.
Run = Callable[[Sequence[int], Iterable[str]], Trace]

# Scores this low are masked: float16's lowest number is the highest mask value in use.
MASKED = -6e4
# A value is wrong where its error is over this many times the reference's.
FACTOR = 2.0


@dataclass(frozen=True)
class Step:
    """One address on the way of a search.

    Attributes:
        address: the module path.
        relative: relRMS against the oracle; inf with another shape or mask, or if never computed.
        reference: the reference's relRMS there; NaN where it has no such value.
        limit: the most that rounding explains.
    """

    address: str
    relative: float
    reference: float
    limit: float


@dataclass(frozen=True)
class Divergence(Step):
    """The first value that is wrong.

    Attributes:
        shape: of the value; () where it was never computed.
        expected_shape: the oracle's.
        place: index of the largest error; () where there is no value of the right shape.
        got: the value there.
        expected: the oracle's.
        theirs: the reference's; NaN where it has none.
        suspect: the mistake that explains the value, or None.
        path: every address compared on the way, this one last.
    """

    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    place: tuple[int, ...]
    got: float
    expected: float
    theirs: float
    suspect: str | None
    path: tuple[Step, ...]

    def __str__(self) -> str:
        """In a few lines."""
        lines = [f"first divergence at {self.address}, shape {self.shape}"]
        if self.shape != self.expected_shape:
            lines[0] += f", expected {self.expected_shape}"
        if self.place:
            lines.append(
                f"relRMS {self.relative:.2e}, over {self.limit:.2e} (the reference: {self.reference:.2e}); "
                f"at {list(self.place)} got {self.got:.9g}, expected {self.expected:.9g}, "
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
            one, the dtype's fixed limit takes its place.
        truth: the computation in float64; None is the oracle.

    Returns:
        None where everything that was given, block by block, is within twice the reference's error. Of a
        layer whose output is not given, what is given of its operations is compared.

    Raises:
        InputError: an address is not one of ours, or nothing was given, so nothing could be compared.
    """
    config, weights = config_fields(right.config), right.state_dict()

    def oracle(ids: Sequence[int], addresses: Iterable[str]) -> Trace:
        trace: Trace = dict.fromkeys(addresses)
        oracle_logits(config, weights, ids, trace)
        return trace

    def values(addresses: Sequence[str], ours: Trace) -> _Values:
        traces = (one(ids, addresses) for one in (truth or oracle, *references))
        true, *theirs = map(_masked, traces)
        return _Values(true, _masked(ours), theirs, right.dtype)

    blocks = stages(right.config.num_hidden_layers)
    given = _given(run, ids, blocks)
    outer = values(list(given), given)
    path = outer.path(list(given))
    if not path:
        raise InputError(f"nothing could be compared: no value was given. {_understood(blocks)}")
    if path[-1].relative <= path[-1].limit:
        return None
    stage = path[-1].address
    block = ".".join(stage.split(".")[:2])  # the layer, or the stage itself
    before = blocks[: blocks.index(block)][-1:]
    inside = [stage]
    if block.startswith("layers.") and outer.ours[stage] is not None:
        inside = [*operations(int(block.removeprefix("layers."))), block]
    inner = values([*before, *inside], run(ids, [*before, *inside]))
    path += inner.path(inside)
    address = path[-1].address
    # What went into the layer, or into an operation outside the layers, is "input".
    seen = {
        "input" if at in before else at: value.to(torch.float64)
        for at, value in inner.ours.items()
        if value is not None
    }
    return inner.divergence(path, Scene(address, seen, config, weights, ids))


def _given(run: Run, ids: Sequence[int], blocks: list[str]) -> Trace:
    """The values to begin with, in order: of blocks, or of the operations of a block that is not given."""
    first = run(ids, blocks)
    hidden = {at for at in blocks if at.startswith("layers.") and at not in first}
    inside = {at: operations(int(at.removeprefix("layers."))) for at in blocks if at.startswith("layers.")}
    second = run(ids, [name for at in blocks if at in hidden for name in inside[at]]) if hidden else {}
    known = {*blocks, *(name for names in inside.values() for name in names)}
    for address in (*first, *second):
        if address not in known:
            meant = did_you_mean(address, known)
            raise InputError(f"{address!r:.80} is no address that is compared{meant} {_understood(blocks)}")
    wanted = [name for at in blocks for name in ((*inside[at], at) if at in hidden else (at,))]
    both = {**second, **first}
    return {address: both[address] for address in wanted if address in both}


def _understood(blocks: list[str]) -> str:
    names = ", ".join(name.removeprefix("layers.0.") for name in operations(0))
    stages = f"{blocks[0]}, {blocks[1]} to {blocks[-3]}, norm, lm_head"
    return f"Expected {stages}; in a layer, as layers.0.*: {names}"


@dataclass(frozen=True)
class _Values:
    """Values by address: the oracle's, those in question, and the references'."""

    truth: Trace
    ours: Trace
    theirs: list[Trace]
    dtype: torch.dtype

    def expected(self, address: str) -> Tensor:
        """The oracle's value."""
        value = self.truth[address]
        assert value is not None, f"the truth has no {address}"
        return value

    def references(self, address: str) -> list[Tensor]:
        """The value in each reference that has it."""
        return [value for trace in self.theirs if (value := trace.get(address)) is not None]

    def path(self, addresses: list[str]) -> list[Step]:
        """The error at each address, up to the first one over its limit."""
        steps = []
        for address in addresses:
            # A fused kernel has neither scores nor pattern.
            optional = address.endswith((".scores", ".pattern"))
            both = (self.ours.get(address), self.truth[address])
            if address not in self.ours or (optional and None in both):
                continue
            ours, expected = self.ours[address], self.expected(address)
            errors = [relative_error(value, expected) for value in self.references(address)]
            worst = max(errors, default=math.nan)
            # A fixed limit without a reference, and in float64, where transformers keeps float32 norms.
            fixed = self.dtype == torch.float64 or not errors
            limit = CEILING[self.dtype] if fixed else FACTOR * worst
            error = math.inf if ours is None else relative_error(ours, expected)
            steps.append(Step(address, error, worst, limit))
            if error > limit:
                break
        return steps

    def divergence(self, path: list[Step], scene: Scene) -> Divergence:
        """The last step of the path, which is wrong."""
        step = path[-1]
        got, expected = self.ours[step.address], self.expected(step.address)
        place: tuple[int, ...] = ()
        numbers = [math.nan] * 3
        if got is not None and got.shape == expected.shape:
            place = _largest_error(got.to(torch.float64), expected)
            theirs = [value[place].item() for value in self.references(step.address)]
            numbers = [got[place].item(), expected[place].item(), theirs[0] if theirs else math.nan]
        if got is None:
            why: str | None = f"{step.address} is skipped"
        elif got.shape == (1, *expected.shape):
            why = "a batch axis: give value[0]"
        else:
            why = suspect(scene)
        return Divergence(
            **asdict(step),
            shape=() if got is None else tuple(got.shape),
            expected_shape=tuple(expected.shape),
            place=place,
            got=numbers[0],
            expected=numbers[1],
            theirs=numbers[2],
            suspect=why,
            path=tuple(path),
        )


def _masked(trace: Trace) -> Trace:
    """The values; scores with -inf for whatever low number masks them."""
    return {
        address: value.masked_fill(value < MASKED, -math.inf)
        if value is not None and address.endswith(".scores")
        else value
        for address, value in trace.items()
    }


def _largest_error(got: Tensor, expected: Tensor) -> tuple[int, ...]:
    """The index at which they differ most; a place that only one of them masks differs most."""
    # NaN where something is NaN, and for -inf less -inf, where both are masked.
    error = torch.where(got == expected, 0.0, (got - expected).abs().nan_to_num(nan=math.inf))
    return tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
