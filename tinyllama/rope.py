"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv:2104.09864).

Dimension pair i of a query or key is turned by the angle position * theta^(-2i/D). After both are turned by
their own positions, q.k depends only on the distance between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tinyllama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians per position for each of the D/2 dimension pairs: theta^(-2i/D).

    With Llama 3.1's scaling (`rope_type: llama3`; Meta's llama-models, `apply_scaling`) a pair whose
    wavelength exceeds the original context turns `factor` times slower, one well within it keeps its speed,
    and between the two borders the speed is interpolated.

    Returns:
        (D/2,) on the CPU. The order of operations is transformers', so that float32 agrees to the bit.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").to(dtype) / D
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies

    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / scaling.factor
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * slowed + smooth * frequencies
    return torch.where(
        wavelengths > context / low, slowed, torch.where(wavelengths < context / high, frequencies, between)
    )


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
        angles = positions[:, None, :, None].to(working) * frequencies  # (B, 1, T, D/2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
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
