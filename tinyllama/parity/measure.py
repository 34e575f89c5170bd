"""How far logits are from the truth, and when that is near enough."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Against R, the worse of transformers' two errors. Correct float32 variants scored 0.98 to 1.4 R on trained
# and random weights, the weakest real bug 8.4 R.
FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.5, torch.float16: 1.5}
# Whatever transformers scores.
CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
MAX_KL_FLOAT32 = 1e-9
# A top-1 flip is forgiven where the oracle's own margin is within this many RMS errors of the reference.
FLIP_MARGIN = 6.0


@dataclass(frozen=True)
class Difference:
    """How far logits are from the oracle's.

    Attributes:
        rms: root mean square error, in logits.
        relative: rms error over the rms of the oracle's logits (relRMS).
        kl_mean: mean over positions of KL(oracle || logits), in nats.
        kl_max: the largest.
        top1: share of positions with the oracle's most likely token.
        flips: the oracle's margin between its token and the chosen one, for each position that differs.
        finite: whether every logit is.
    """

    rms: float
    relative: float
    kl_mean: float
    kl_max: float
    top1: float
    flips: tuple[float, ...]
    finite: bool


@dataclass(frozen=True)
class Verdict:
    """Whether a difference passes, and if not, every criterion that it breaks."""

    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No criterion is broken."""
        return not self.failures


def difference(logits: Tensor, truth: Tensor) -> Difference:
    """Measure logits against the oracle's.

    Args:
        logits: (N, V), of N positions.
        truth: (N, V) in float64.
    """
    logits = logits.to(torch.float64)
    error = logits - truth
    expected, got = truth.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    kl = (expected.exp() * (expected - got)).sum(dim=-1)
    best, chosen = truth.argmax(dim=-1, keepdim=True), logits.argmax(dim=-1, keepdim=True)
    margins = (truth.gather(-1, best) - truth.gather(-1, chosen)).squeeze(-1)
    flipped = (best != chosen).squeeze(-1)
    rms = error.square().mean().sqrt().item()
    return Difference(
        rms=rms,
        relative=rms / truth.square().mean().sqrt().item(),
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        top1=1 - flipped.double().mean().item(),
        flips=tuple(margins[flipped].tolist()),
        finite=bool(logits.isfinite().all()),
    )


def judge(ours: Difference, references: list[Difference], dtype: torch.dtype) -> Verdict:
    """Judge our difference by those of the references, by the criteria for that dtype.

    float64 and float32 prove correctness; the 16-bit types only show that no further error was added.
    """
    worst = max(references, key=lambda reference: reference.relative)
    failures = []

    def require(passes: bool, what: str) -> None:
        # A comparison with NaN is false, so NaN never passes.
        if not passes:
            failures.append(what)

    require(ours.finite, "a logit is not finite")
    ceiling = CEILING[dtype]
    require(ours.relative <= ceiling, f"relRMS {ours.relative:.2e} is over {ceiling:.0e}")
    if dtype == torch.float64:
        return Verdict(tuple(failures))
    limit = FACTOR[dtype] * worst.relative
    require(ours.relative <= limit, f"relRMS {ours.relative:.2e} is over {FACTOR[dtype]} R = {limit:.2e}")
    margin = FLIP_MARGIN * worst.rms
    require(max(ours.flips, default=0.0) <= margin, f"a top-1 flip has a margin over {margin:.2e}")
    if dtype == torch.float32:
        require(ours.kl_max <= MAX_KL_FLOAT32, f"KL max {ours.kl_max:.2e} is over {MAX_KL_FLOAT32:.0e}")
    else:
        limit = 2 * worst.kl_mean
        require(
            ours.kl_mean <= limit, f"KL mean {ours.kl_mean:.2e} is over twice transformers' = {limit:.2e}"
        )
    return Verdict(tuple(failures))
