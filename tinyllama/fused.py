"""A layer's operations beside its matrix products, each in one compiled pass instead of PyTorch's many.

The modules hold nothing of their own and compute what their base classes say, to which they leave everything
but plain passes on a CPU: gradients, other kernels, values that someone reads or replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyllama import native
from tinyllama.attention import Attention, Visibility, sdpa
from tinyllama.cache import KVCache
from tinyllama.model import MLP, RMSNorm


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass over x."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; (..., C) -> (..., C)."""
        weight = self.weight
        if not _plain(x) or x.dtype != weight.dtype or (torch.is_grad_enabled() and weight.requires_grad):
            return super().forward(x)
        return native.rms_norm(x.contiguous(), weight, self.eps)


class FusedMLP(MLP):
    """SwiGLU with the product of gate and up in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token on its own; (B, T, C) -> (B, T, C)."""
        if not _plain(x):
            return super().forward(x)
        return self.down_proj(self.product(native.swiglu(self.gate_proj(x), self.up_proj(x))))


class FusedAttention(Attention):
    """RoPE, the cache and `sdpa` in one pass, without a mask: a token sees the slots up to its own."""

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Visibility, cache: KVCache | None
    ) -> Tensor:
        """Let each token gather from those it sees; arguments and result as in `Attention`."""
        if cache is None or not _plain(x) or not self._fits(x, cache):
            return super().forward(x, rotation, visible, cache)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        positions = visible.query_positions.contiguous()
        z = native.attend(q, k, v, *rotation, positions, cache.keys[self.layer], cache.values[self.layer])
        return self.o_proj(self.z(z.transpose(1, 2)).transpose(1, 2).flatten(2))

    def _fits(self, x: Tensor, cache: KVCache) -> bool:
        return (
            self.kernel is sdpa
            and type(cache) is KVCache
            and cache.keys.dtype == x.dtype
            and self.head_dim % native.LANES == 0
            # Nobody asks for what is not computed apart.
            and not any(tap._forward_hooks for tap in (self.q_rot, self.k_rot, self.scores, self.pattern))
        )


def _plain(x: Tensor) -> bool:
    """Whether compiled code, which has no gradients, can take it."""
    return x.dtype in native.STEP_DTYPES and x.is_cpu and not (x.requires_grad and torch.is_grad_enabled())


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    MLP: FusedMLP,
    Attention: FusedAttention,
}


def fuse(model: nn.Module) -> None:
    """Let a model's norms, MLPs and attentions be fused, in place, where there is a C compiler."""
    if native.available():
        for module in model.modules():
            module.__class__ = FUSED.get(type(module), type(module))
