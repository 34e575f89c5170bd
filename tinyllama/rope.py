"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv:2104.09864).

Dimension pair i of a query or key is turned by the angle position * theta^(-2i/D). After both are turned by
their own positions, q.k depends only on the distance between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyllama.config import LlamaConfig
from tinyllama.rope_scaling import DynamicScaling


def inverse_frequencies(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians per position for each of the D/2 dimension pairs: theta^(-2i/D), or what a scaling makes of it.

    Returns:
        (D/2,) on the CPU. The order of operations is transformers', so that float32 agrees to the bit.
    """
    exponents = _exponents(config, dtype, "cpu")
    if config.rope_scaling is not None:
        return config.rope_scaling.frequencies(exponents, config)
    return 1.0 / config.rope_theta**exponents


def _exponents(config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """2i/D for each pair i."""
    return torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).to(dtype) / config.head_dim


class RotaryEmbedding(nn.Module):
    """The cosines and sines of every position's angles."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # Not buffers: model.to(bfloat16) would round a buffer (logits moved by 0.07), and a model made on the
        # meta device would leave it empty.
        self._frequencies: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for dtype in (torch.float32, torch.float64):  # torch.compile would take the first call into its graph
            self.frequencies(dtype, torch.device("cpu"))

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`inverse_frequencies`, computed once for each dtype and device in which the model is used."""
        if (dtype, device) not in self._frequencies:
            self._frequencies[dtype, device] = inverse_frequencies(self.config, dtype).to(device)
        return self._frequencies[dtype, device]

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what `rotate` needs: cos and sin of each position's angles.

        Args:
            positions: (B, T) integers.
            dtype: of the result. The angles are computed in float32 at least: in bfloat16, position 257
                would be position 256.

        Returns:
            (cos, cos) and (-sin, sin), each (B, 1, T, D): one rotation for all heads.
        """
        working = torch.promote_types(dtype, torch.float32)
        frequencies = self.frequencies(working, positions.device)  # (D/2,)
        scaling = self.config.rope_scaling
        if isinstance(scaling, DynamicScaling):  # the one kind that changes with the text
            length = positions.max() + 1
            exponents = _exponents(self.config, working, positions.device)
            grown = scaling.frequencies(exponents, self.config, length)
            frequencies = torch.where(length > self.config.max_position_embeddings, grown, frequencies)
        angles = positions[:, None, :, None].to(working) * frequencies  # (B, 1, T, D/2)
        magnitude = 1.0 if scaling is None else scaling.magnitude
        cos, sin = (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each dimension pair by its angle: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    x1 is the first half of a head and x2 the second: the Hugging Face layout pairs dimension i with i + D/2.
    Meta's original checkpoints pair 2i with 2i + 1.

    Args:
        x: (B, heads, T, D).
        cos: (B, 1, T, D), from `RotaryEmbedding`.
        sin: (B, 1, T, D), its first half negated.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # roll: (x1, x2) -> (x2, x1)
