"""How far logits are from the oracle's, and which distance passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Times R, the larger of transformers' two errors. Correct float32 variants scored 0.98 to 1.4 R on trained
# and random weights; the weakest real bug scored 8.4 R.
FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.5, torch.float16: 1.5}
# Limits on relRMS that hold however large transformers' own error is.
CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# On short texts the KL of transformers' float32 stays under 1e-10. Near 2,000 tokens it reaches 4e-9, because
# the errors of RoPE's angles grow with the position. There the limit is its own maximum times 4: twice the
# error has four times the KL.
MAX_KL_FLOAT32 = 1e-9
KL_FACTOR_FLOAT32 = 4.0
# A top-1 flip passes where the oracle's own margin is at most this many RMS errors of the reference.
FLIP_MARGIN = 6.0
# Positions measured at once: one position's logits in float64 are 0.4 MB, and larger temporary tensors are
# slow, because the allocator gets their memory from the system each time.
CHUNK = 32


@dataclass(frozen=True, eq=False)
class Difference:
    """How far logits are from the oracle's, at each of N positions; the properties summarise them.

    Attributes:
        squared: mean over the vocabulary of the squared error, (N,).
        truth_squared: mean of the oracle's squared logits.
        absolute: mean of the absolute error.
        largest: the largest absolute error.
        kl: KL(oracle || logits) in nats.
        expected: the oracle's most likely id.
        chosen: the most likely id.
        margin: the oracle's logit of its own id less that of the chosen one; 0 where they agree.
        nll: -log p of the text's next token, in nats; NaN where the text ends.
        truth_nll: the oracle's.
    """

    squared: Tensor
    truth_squared: Tensor
    absolute: Tensor
    largest: Tensor
    kl: Tensor
    expected: Tensor
    chosen: Tensor
    margin: Tensor
    nll: Tensor
    truth_nll: Tensor

    @staticmethod
    def joined(parts: Sequence[Difference]) -> Difference:
        """The positions of several texts as one."""
        return Difference(
            **{
                field.name: torch.cat([getattr(part, field.name) for part in parts])
                for field in fields(Difference)
            }
        )

    @property
    def rms(self) -> float:
        """Root mean square error, in logits."""
        return self.squared.mean().sqrt().item()

    @property
    def relative(self) -> float:
        """RMS error over the RMS of the oracle's logits (relRMS)."""
        return (self.squared.mean() / self.truth_squared.mean()).sqrt().item()

    @property
    def mean(self) -> float:
        """Mean absolute error, in logits."""
        return self.absolute.mean().item()

    @property
    def max(self) -> float:
        """Largest absolute error, in logits."""
        return self.largest.max().item()

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence from the oracle, in nats."""
        return self.kl.mean().item()

    @property
    def kl_p99(self) -> float:
        """The 99th percentile of the KL divergence over positions."""
        return self.kl.quantile(0.99).item()

    @property
    def kl_max(self) -> float:
        """The largest KL divergence."""
        return self.kl.max().item()

    @property
    def flipped(self) -> Tensor:
        """Where the most likely token is not the oracle's, (N,)."""
        return self.expected != self.chosen

    @property
    def top1(self) -> float:
        """Share of positions with the oracle's most likely token."""
        return 1 - self.flipped.double().mean().item()

    @property
    def flip_margin(self) -> float:
        """The oracle's largest margin at a flip; 0 without one."""
        return self.margin[self.flipped].max().item() if self.flipped.any() else 0.0

    @property
    def nll_change(self) -> float:
        """Mean change of -log p of the next token, in nats."""
        return (self.nll - self.truth_nll).nanmean().item()

    @property
    def finite(self) -> bool:
        """Whether every logit is finite."""
        return bool(self.largest.isfinite().all())


@dataclass(frozen=True)
class Verdict:
    """Whether a difference passes; `failures` names every criterion that it breaks."""

    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no criterion is broken."""
        return not self.failures


def difference(logits: Tensor, truth: Tensor, ids: Sequence[int] = ()) -> Difference:
    """Measure logits against the oracle's.

    Args:
        logits: (N, V).
        truth: the oracle's logits, (N, V) in float64.
        ids: the text, N ids: gives the likelihood of each next token. Without it, `nll` is NaN.
    """
    following = torch.tensor([*ids[1:], -1] if len(ids) else [-1] * len(truth), device=truth.device)
    chunks = range(0, len(truth), CHUNK)
    return Difference.joined(
        [_chunk(*(t[i : i + CHUNK] for t in (logits, truth, following))) for i in chunks]
    )


def _chunk(logits: Tensor, truth: Tensor, next_ids: Tensor) -> Difference:
    logits = logits.to(torch.float64)
    error = (logits - truth).abs()
    expected, got = truth.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    best, chosen = truth.argmax(dim=-1, keepdim=True), logits.argmax(dim=-1, keepdim=True)
    follows = next_ids[:, None].clamp(min=0)

    def nll(log_probabilities: Tensor) -> Tensor:
        return (-log_probabilities.gather(-1, follows)).squeeze(-1).masked_fill(next_ids < 0, torch.nan)

    return Difference(
        squared=error.square().mean(dim=-1),
        truth_squared=truth.square().mean(dim=-1),
        absolute=error.mean(dim=-1),
        largest=error.amax(dim=-1),
        kl=(expected.exp() * (expected - got)).sum(dim=-1).clamp(min=0),
        expected=best.squeeze(-1),
        chosen=chosen.squeeze(-1),
        margin=(truth.gather(-1, best) - truth.gather(-1, chosen)).squeeze(-1),
        nll=nll(got),
        truth_nll=nll(expected),
    )


@dataclass(frozen=True)
class Limits:
    """The largest figures that pass (`top1`: the smallest); an infinite limit judges nothing.

    Attributes:
        relative: relRMS.
        kl_mean: nats.
        kl_max: nats.
        flip_margin: the oracle's margin at a flip, in logits.
        top1: share of positions with the oracle's most likely token.
        nll_change: nats.
    """

    relative: float = math.inf
    kl_mean: float = math.inf
    kl_max: float = math.inf
    flip_margin: float = math.inf
    top1: float = -math.inf
    nll_change: float = math.inf


# What rounding the weights to 8 bits may do to the model: perplexity is e^NLL, and may rise by 1%.
INT8_LIMITS = Limits(kl_mean=0.01, top1=0.95, nll_change=math.log(1.01))


def limits(references: Sequence[Difference], dtype: torch.dtype) -> Limits:
    """The criteria of a dtype. float64 and float32 prove correctness, 16 bits only that no error was added.

    Args:
        references: transformers' own differences; without any, only the dtype's fixed limit is left.
        dtype: the dtype under test.
    """
    ceiling = CEILING[dtype]
    if dtype == torch.float64 or not references:
        return Limits(ceiling)
    worst = max(references, key=lambda reference: reference.relative)
    worst_kl = max(reference.kl_max for reference in references)
    wide = dtype == torch.float32
    return Limits(
        relative=min(FACTOR[dtype] * worst.relative, ceiling),
        kl_mean=math.inf if wide else 2 * worst.kl_mean,
        kl_max=max(MAX_KL_FLOAT32, KL_FACTOR_FLOAT32 * worst_kl) if wide else math.inf,
        flip_margin=FLIP_MARGIN * worst.rms,
    )


def judge(ours: Difference, references: Sequence[Difference], dtype: torch.dtype) -> Verdict:
    """Judge our difference from the oracle by those of the references, by the criteria of the dtype."""
    return Verdict(broken(ours, limits(references, dtype)))


def broken(ours: Difference, limit: Limits) -> tuple[str, ...]:
    """Every criterion that our difference breaks, each in one line."""
    perplexity, most = torch.tensor([ours.nll_change, limit.nll_change]).expm1().tolist()
    # Each line with whether it passes. A comparison with NaN is false, so NaN fails.
    criteria = {
        "a logit is not finite": ours.finite,
        f"relRMS {ours.relative:.2e} is over {limit.relative:.2e}": ours.relative <= limit.relative,
        f"a top-1 flip has a margin of {ours.flip_margin:.2e}, over {limit.flip_margin:.2e}": ours.flip_margin
        <= limit.flip_margin,
        f"KL max {ours.kl_max:.2e} is over {limit.kl_max:.2e}": ours.kl_max <= limit.kl_max,
        f"KL mean {ours.kl_mean:.2e} is over {limit.kl_mean:.2e}": ours.kl_mean <= limit.kl_mean,
        f"top-1 {ours.top1:.2%} is under {limit.top1:.0%}": ours.top1 >= limit.top1,
        # Without the text the change is NaN, which fails only where there is a limit.
        f"perplexity changes by {perplexity:+.2%}, over {most:+.2%}": ours.nll_change <= limit.nll_change
        or math.isinf(limit.nll_change),
    }
    return tuple(failure for failure, passes in criteria.items() if not passes)
