"""What every check of the contract needs: random inputs, the kernel's output for them, and a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, AttentionMask, Kernel
from tinyllama.config import LlamaConfig
from tinyllama.parity.measure import CEILING
from tinyllama.rope import RotaryEmbedding


@dataclass(frozen=True)
class Trial:
    """A kernel, and the shape in which it is tried on the CPU.

    Attributes:
        kernel: the kernel under test.
        H: query heads.
        K: KV heads.
        D: head_dim.
        layer: the layer that the kernel is told it is in.
    """

    kernel: Kernel
    H: int
    K: int
    D: int
    layer: int

    def draw(self, B: int, T: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """Random q (B, H, T, D), k and v (B, K, T, D)."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.H, self.K, self.K)
        return [torch.randn(B, n, T, self.D, generator=generator).to(dtype) for n in heads]

    def visible(self, positions: Tensor, keys: Tensor | None = None, causal: bool = False) -> AttentionMask:
        """What queries at (B, T) positions see of keys at (B or 1, S) positions; by default the same ones."""
        return AttentionMask.of(positions, positions if keys is None else keys, causal, self.rotary)

    def attend(self, inputs: Sequence[Tensor], mask: AttentionMask) -> Tensor:
        """The kernel's output for q, k and v."""
        q, k, v = inputs
        heads = range(self.H), self.H
        return self.kernel(
            q, k, v, AttentionContext(mask, self.D**-0.5, self.layer, lambda x: x, lambda x: x, *heads)
        )

    def run(self, inputs: Sequence[Tensor], positions: Tensor, keys: Tensor | None = None) -> Tensor:
        """The output for queries and keys at these positions."""
        return self.attend(inputs, self.visible(positions, keys))

    def whole(self, inputs: Sequence[Tensor], causal: bool = True) -> Tensor:
        """The output for whole texts; `causal` tells the kernel that the mask is a plain triangle."""
        B, _, T, _ = inputs[0].shape
        return self.attend(inputs, self.visible(torch.arange(T).expand(B, -1), causal=causal))

    @cached_property
    def rotary(self) -> RotaryEmbedding:
        """RoPE for this head_dim."""
        return RotaryEmbedding(LlamaConfig(head_dim=self.D))


def differs(what: str, z: Tensor, expected: Tensor) -> Iterator[str]:
    """A description if two float32 outputs differ by more than rounding: the worst query's RMS error."""
    size = expected.double().square().mean().sqrt()
    error = (z.double() - expected.double()).square().mean(dim=-1).amax().sqrt()
    relative = (error / torch.where(size > 0, size, 1.0)).item()
    # Not `>`: a comparison with NaN is false.
    if not relative <= CEILING[torch.float32]:
        yield f"{what} differs by {relative:.1e} of its RMS"


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
