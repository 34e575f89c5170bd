"""How much worse a text is predicted after a change, and how certain that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.model import Llama

# The bootstrap draws blocks: neighbouring tokens are alike.
BLOCK = 64
RESAMPLES = 2000
# With fewer blocks a bootstrap interval is too narrow to be worth showing.
FEWEST_BLOCKS = 5


@dataclass(frozen=True)
class Perplexity:
    """A text's perplexity, exp of the mean -log p of each next token, before and after a change.

    Attributes:
        before: of the unchanged model.
        after: of the changed one.
        ratio: after / before.
        low: lower end of the ratio's 95% confidence interval; None if the texts are too short for one.
        high: its upper end.
    """

    before: float
    after: float
    ratio: float
    low: float | None
    high: float | None


def perplexity(nll: Sequence[Tensor], before: Sequence[Tensor]) -> Perplexity:
    """Compare -log p of each next token before and after a change.

    The interval is a paired percentile bootstrap over blocks of tokens (Efron & Tibshirani 1993, chapter 8):
    the range for other text of this kind, not for another model.

    Args:
        nll: after the change, (N,) for each text; NaN where no token follows.
        before: before the change, (N,) for each text.
    """
    known = [~now.isnan() for now in nll]
    after_all, before_all = (
        torch.cat([x[seen] for x, seen in zip(texts, known, strict=True)]).double() for texts in (nll, before)
    )
    sums, counts = _blocks(nll, before)
    low = high = None
    if len(sums) >= FEWEST_BLOCKS:
        drawn = torch.randint(
            len(sums), (RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0), device="cpu"
        )
        means = sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
        low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).exp().tolist()
    return Perplexity(
        before=before_all.mean().exp().item(),
        after=after_all.mean().exp().item(),
        ratio=(after_all - before_all).mean().exp().item(),
        low=low,
        high=high,
    )


@torch.inference_mode()
def text_nll(model: Llama, ids: Sequence[int], length: int) -> Tensor:
    """-log p of each next token, (N - 1,), in windows of `length` tokens read separately."""
    device = model.embed_tokens.weight.device
    parts = []
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor(ids[start : start + length + 1], device=device)
        logits = model(window[None, :-1])[0]
        parts.append(F.cross_entropy(logits.double(), window[1:], reduction="none"))
    return torch.cat(parts)


def _blocks(nll: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the changes and the number of tokens in each block of each text."""
    changes = [(now - then)[~now.isnan()].double().cpu() for now, then in zip(nll, before, strict=True)]
    blocks = [block for change in changes for block in change.split(BLOCK)]
    return torch.stack([block.sum() for block in blocks]), torch.tensor([len(block) for block in blocks])
