"""Choosing the next token: pure functions of logits, and the Sampler that chains them.

The steps, their order and the random draw are those of transformers' `generate`, so the same seed chooses
the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.errors import InputError

# Below this, dividing could overflow float32, and the smallest gap between two logits of ordinary size (2e-6)
# is worth more than a nat: what is asked for is greedy.
GREEDY_BELOW = 1e-6


class NonFiniteLogitsError(ArithmeticError):
    """The model gave NaN or infinite logits, which no rule can choose from."""

    def __init__(self) -> None:
        super().__init__("the model gave NaN or infinite logits; try float32, or check the weights")


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely (Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1).

    Args:
        logits: (B, V).
        seen: (B, V), True for ids that the row has had.
        penalty: positive logits are divided by it, negative ones multiplied; 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits (Fan et al. 2018, arXiv:1805.04833); the rest become -inf.

    Ties with the k-th stay too; k = 0 keeps all.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus (Holtzman et al. 2019, arXiv:1904.09751); the rest become -inf.

    It is the smallest set of tokens with a mass of at least p, and never empty; p = 1 keeps all.
    """
    if p == 1.0:
        return logits
    # Ascending, as transformers sorts: which of equal logits at the border stays depends on it.
    ascending, order = logits.sort(descending=False)
    outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    outside[..., -1] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy, where the most likely token always wins.
        top_k: sample among the k most likely only; 0 is off (transformers' `generate` has 50 by default).
        top_p: sample within the nucleus of this mass only; 1 is off.
        repetition_penalty: above 1 makes tokens that occurred less likely, greedy or not; 1 is off.
        seed: of the random numbers; the same seed gives the same tokens. None takes a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that no distribution belongs to."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                f"temperature: expected 0 (greedy) or a finite number above, got {self.temperature}"
            )
        if self.top_k < 0:
            raise InputError(f"top_k: expected 0 (off) or a positive integer, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a number above 0, up to 1 (off), got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(
                f"repetition_penalty: expected a finite number above 0, got {self.repetition_penalty}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token always wins."""
        return self.temperature < GREEDY_BELOW

    def generator(self, device: torch.device) -> torch.Generator:
        """A random number generator of its own: the global one is left alone."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution that a token is drawn from.

        Args:
            logits: (B, V).
            seen: (B, V), True for ids that the row has had; needed for a repetition penalty only.

        Returns:
            (B, V) in float32; a greedy sampler puts all mass on the most likely token, the lowest id on ties.
        """
        scores = self._penalised(logits, seen)
        if self.greedy:
            return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
        if self.temperature != 1.0:
            scores = scores / self.temperature
        return top_p(top_k(scores, self.top_k), self.top_p).softmax(dim=-1)

    def choose(self, logits: Tensor, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
        """Choose a token for every row.

        Args:
            logits: (B, V), of each row's last position.
            generator: see `generator`; one draw serves the whole batch.
            seen: see `probabilities`.

        Returns:
            (B,) ids.

        Raises:
            NonFiniteLogitsError: a logit is NaN or infinite.
        """
        if not logits.isfinite().all():
            raise NonFiniteLogitsError
        if self.greedy:
            return self._penalised(logits, seen).argmax(dim=-1)
        return torch.multinomial(self.probabilities(logits, seen), 1, generator=generator).squeeze(-1)

    def _penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        scores = logits.float()
        if self.repetition_penalty == 1.0:
            return scores
        if seen is None:
            raise InputError("repetition_penalty: needs the ids seen so far, got none")
        return repetition_penalty(scores, seen, self.repetition_penalty)
