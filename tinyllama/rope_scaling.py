"""The ways in which RoPE is stretched, so that a model reads texts longer than those it was trained on.

A pair of dimensions turns once every 2 pi / frequency positions. Angles that training never reached are
strange to a model; all four ways lower frequencies until a longer text stays within the known angles, and
differ in which pairs they slow. Fields have config.json's names. The order of operations is transformers', so
that float32 agrees to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tinyllama.errors import InputError
from tinyllama.fields import MAX_INTEGER, check_fields

if TYPE_CHECKING:  # a config is read before torch is imported
    from torch import Tensor

    from tinyllama.config import LlamaConfig

MOST_TURNS = 1e6  # beta_fast and beta_slow; 32 and 1 as published


@dataclass(frozen=True)
class RopeScaling:
    """What all ways have in common.

    Attributes:
        rope_type: the name in config.json.
        factor: how many times longer texts may become.
    """

    rope_type: ClassVar[str]
    factor: float

    def __post_init__(self) -> None:
        """Refuse values that cannot be computed with."""
        check_fields(self, "rope_scaling.")

    def frequencies(self, exponents: Tensor, config: LlamaConfig) -> Tensor:
        """Radians per position of each pair, (D/2,), from the exponents 2i/D of theta."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """What cos and sin, and so queries and keys, are multiplied by."""
        return 1.0

    def context(self, config: LlamaConfig) -> int:
        """How many tokens a text may have."""
        return config.max_position_embeddings

    def _stretched(self, original: int, config: LlamaConfig) -> int:
        """`factor` times the original context, but no less than the file says."""
        return max(config.max_position_embeddings, int(min(self.factor * original, MAX_INTEGER)))


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Every pair turns `factor` times slower (Chen et al. 2023, Position Interpolation, arXiv:2306.15595)."""

    rope_type: ClassVar[str] = "linear"

    def frequencies(self, exponents: Tensor, config: LlamaConfig) -> Tensor:
        """See RopeScaling."""
        return 1.0 / config.rope_theta**exponents / self.factor


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Theta grows with the text, once that exceeds the context (NTK-aware; described in arXiv:2309.00071).

    A larger theta leaves the fastest pair as it is and slows the slowest most. Keys in a cache keep the
    angles of the length at which they were computed, here as in transformers.
    """

    rope_type: ClassVar[str] = "dynamic"

    def frequencies(self, exponents: Tensor, config: LlamaConfig, length: Tensor | None = None) -> Tensor:
        """See RopeScaling; `length`, a scalar, is the text's where it exceeds the context."""
        context, D = config.max_position_embeddings, config.head_dim
        reach = context if length is None else length.to(exponents.dtype)
        growth = self.factor * reach / context - (self.factor - 1)
        return 1.0 / (config.rope_theta * growth ** (D / (D - 2))) ** exponents

    def context(self, config: LlamaConfig) -> int:
        """See RopeScaling: `max_position_embeddings` is what training reached."""
        return self._stretched(config.max_position_embeddings, config)


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Only slow pairs are slowed (Llama 3.1; Meta's llama-models, `apply_scaling`).

    A pair whose wavelength exceeds the original context turns `factor` times slower, one well within it keeps
    its speed, and between the two borders the speed is interpolated.
    """

    rope_type: ClassVar[str] = "llama3"
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """Refuse values that cannot be computed with."""
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError("rope_scaling: high_freq_factor must exceed low_freq_factor; correct the file")

    def frequencies(self, exponents: Tensor, config: LlamaConfig) -> Tensor:
        """See RopeScaling."""
        frequencies = 1.0 / config.rope_theta**exponents
        low, high = self.low_freq_factor, self.high_freq_factor
        context = self.original_max_position_embeddings
        wavelengths = 2 * math.pi / frequencies
        slowed = frequencies / self.factor
        smooth = (context / wavelengths - low) / (high - low)
        between = (1 - smooth) * slowed + smooth * frequencies
        kept_or_between = frequencies.where(wavelengths < context / high, between)
        return slowed.where(wavelengths > context / low, kept_or_between)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Slow pairs are slowed, fast ones not, and scores grow (Peng et al. 2023, YaRN, arXiv:2309.00071).

    A pair that turns more than `beta_fast` times within the original context keeps its speed, one that turns
    less than `beta_slow` times is slowed by `factor`, and between those two pairs a straight line leads from
    one to the other.

    Attributes:
        attention_factor: the magnitude; None computes it from the three others.
        mscale: with `mscale_all_dim`, a weight on the logarithm in it.
        truncate: round the two border pairs outwards to whole ones.
    """

    rope_type: ClassVar[str] = "yarn"
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot be computed with."""
        super().__post_init__()
        if not self.beta_slow < self.beta_fast <= MOST_TURNS:
            raise InputError(
                f"rope_scaling: beta_fast must exceed beta_slow and be {MOST_TURNS:g} at most, got "
                f"{self.beta_fast:g} and {self.beta_slow:g}; correct the file"
            )

    def frequencies(self, exponents: Tensor, config: LlamaConfig) -> Tensor:
        """See RopeScaling."""
        D, periods = config.head_dim, config.rope_theta**exponents

        def pair_that_turns(times: float) -> float:
            """Which pair turns that often within the original context: a fraction of an index."""
            span = self.original_max_position_embeddings / (times * 2 * math.pi)
            return D * math.log(span) / (2 * math.log(config.rope_theta))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        if first == last:
            last += 0.001  # a step, not a division by zero
        ramp = (exponents.new_tensor(range(D // 2)) - first) / (last - first)
        kept = 1 - ramp.clamp(0, 1)
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept

    @property
    def magnitude(self) -> float:
        """See RopeScaling; the paper's 0.1 ln(factor) + 1 keeps attention sharp in long texts."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def context(self, config: LlamaConfig) -> int:
        """See RopeScaling; `max_position_embeddings` is stretched already in some files, not in others."""
        return self._stretched(self.original_max_position_embeddings, config)


SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.rope_type: scaling for scaling in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)
}
