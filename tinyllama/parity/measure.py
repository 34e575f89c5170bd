"""How far logits are from the truth, and when that is near enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Against R, the worse of transformers' two errors. Correct float32 variants scored 0.98 to 1.4 R on trained
# and random weights, the weakest real bug 8.4 R.
FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.5, torch.float16: 1.5}
# Whatever transformers scores.
CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# Over short texts transformers' float32 stays under 1e-10. Near 2,000 tokens it reaches 4e-9 itself, since
# the errors of RoPE's angles grow with the position. There its own maximum counts, times 4: an error of
# twice the size has four times the KL.
MAX_KL_FLOAT32 = 1e-9
KL_FACTOR_FLOAT32 = 4.0
# A top-1 flip is forgiven where the oracle's own margin is within this many RMS errors of the reference.
FLIP_MARGIN = 6.0
# Positions measured at once: a vocabulary in float64 is 0.4 MB a position, and larger temporaries would be
# fetched from the system anew each time.
CHUNK = 32


@dataclass(frozen=True, eq=False)
class Difference:
    """How far logits are from the oracle's: a figure for each of N positions, and their summaries.

    Attributes:
        squared: mean over the vocabulary of the squared error, (N,).
        truth_squared: mean of the oracle's squared logits.
        absolute: mean of the absolute error.
        largest: the largest absolute error.
        kl: KL(oracle || logits) in nats.
        expected: the oracle's most likely id.
        chosen: the most likely id.
        margin: the oracle's logit of its own id less that of the chosen one; 0 where they agree.
        nll: -log p of the token that follows, in nats; NaN where none does.
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
        """The KL divergence that 99% of the positions stay under."""
        return self.kl.quantile(0.99).item()

    @property
    def kl_max(self) -> float:
        """The largest KL divergence."""
        return self.kl.max().item()

    @property
    def flipped(self) -> Tensor:
        """Where the most likely token is another than the oracle's, (N,)."""
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
        """Mean change of -log p of the token that follows, in nats."""
        return (self.nll - self.truth_nll).nanmean().item()

    @property
    def finite(self) -> bool:
        """Whether every logit is."""
        return bool(self.largest.isfinite().all())


@dataclass(frozen=True)
class Verdict:
    """Whether a difference passes, and if not, every criterion that it breaks."""

    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No criterion is broken."""
        return not self.failures


def difference(logits: Tensor, truth: Tensor, ids: Sequence[int] = ()) -> Difference:
    """Measure logits against the oracle's.

    Args:
        logits: (N, V), of N positions.
        truth: (N, V) in float64.
        ids: the text itself, N ids, for the likelihood of each next token.
    """
    following = [*list(ids)[1:], -1] if len(ids) else [-1] * len(truth)
    next_ids = torch.tensor(following, device=truth.device)
    chunks = range(0, len(truth), CHUNK)
    return Difference.joined([_chunk(*(t[i : i + CHUNK] for t in (logits, truth, next_ids))) for i in chunks])


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
    """The most that passes, for one dtype and the reference's errors; inf where there is no such limit.

    Attributes:
        relative: relRMS.
        relative_why: where that comes from.
        kl_mean: nats.
        kl_mean_why: where that comes from.
        kl_max: nats.
        flip_margin: the oracle's margin at a flip, in logits.
        top1: the least share of positions with the oracle's most likely token.
        nll_change: nats, where the perplexity may rise by a share of itself.
    """

    relative: float = torch.inf
    relative_why: str = ""
    kl_mean: float = torch.inf
    kl_mean_why: str = ""
    kl_max: float = torch.inf
    flip_margin: float = torch.inf
    top1: float = 0.0
    nll_change: float = torch.inf


# What rounding the weights to 8 bits may do to the model: perplexity is e^NLL, and may rise by 1%.
INT8_LIMITS = Limits(kl_mean=0.01, top1=0.95, nll_change=math.log(1.01))


def limits(references: Sequence[Difference], dtype: torch.dtype) -> Limits:
    """The criteria in numbers. float64 and float32 prove correctness, 16 bits only that no error was added.

    Args:
        references: transformers' own differences; none where there is no reference.
        dtype: the dtype under test.
    """
    ceiling = CEILING[dtype]
    if dtype == torch.float64 or not references:
        return Limits(ceiling, f"{ceiling:.0e}")
    worst = max(references, key=lambda reference: reference.relative)
    worst_kl = max(reference.kl_max for reference in references)
    limit = FACTOR[dtype] * worst.relative
    wide = dtype == torch.float32
    return Limits(
        relative=min(limit, ceiling),
        relative_why=f"{FACTOR[dtype]} R = {limit:.2e}" if limit < ceiling else f"{ceiling:.0e}",
        kl_mean=torch.inf if wide else 2 * worst.kl_mean,
        kl_mean_why=f"twice transformers' = {2 * worst.kl_mean:.2e}",
        kl_max=max(MAX_KL_FLOAT32, KL_FACTOR_FLOAT32 * worst_kl) if wide else torch.inf,
        flip_margin=FLIP_MARGIN * worst.rms,
    )


def judge(ours: Difference, references: Sequence[Difference], dtype: torch.dtype) -> Verdict:
    """Judge our difference by those of the references, by the criteria for that dtype."""
    return Verdict(broken(ours, limits(references, dtype)))


def broken(ours: Difference, limit: Limits) -> tuple[str, ...]:
    """Every criterion that our difference breaks."""
    perplexity, most = torch.tensor([ours.nll_change, limit.nll_change]).expm1().tolist()
    # A comparison with NaN is false, so NaN never passes.
    criteria = {
        "a logit is not finite": ours.finite,
        f"relRMS {ours.relative:.2e} is over {limit.relative_why}": ours.relative <= limit.relative,
        f"a top-1 flip has a margin of {ours.flip_margin:.2e}, over {limit.flip_margin:.2e}": ours.flip_margin
        <= limit.flip_margin,
        f"KL max {ours.kl_max:.2e} is over {limit.kl_max:.1e}": ours.kl_max <= limit.kl_max,
        f"KL mean {ours.kl_mean:.2e} is over {limit.kl_mean_why or f'{limit.kl_mean:.2e}'}": ours.kl_mean
        <= limit.kl_mean,
        f"top-1 {ours.top1:.2%} is under {limit.top1:.0%}": ours.top1 >= limit.top1,
        # Without the text there is no likelihood: NaN, which only a limit may refuse.
        f"perplexity changes by {perplexity:+.2%}, over {most:+.2%}": ours.nll_change <= limit.nll_change
        or math.isinf(limit.nll_change),
    }
    return tuple(failure for failure, passes in criteria.items() if not passes)
