"""A layer's operations in compiled passes instead of PyTorch's many: each of them, or all in one call.

The modules hold nothing of their own and compute what their base classes say, to which they leave everything
but plain passes on a CPU: gradients, other kernels, values that someone reads or replaces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.attention import Attention, Tap, Visibility, sdpa
from tinyllama.cache import KVCache
from tinyllama.fast import native
from tinyllama.fast.linear import FastLinear, Int8Linear
from tinyllama.model import MLP, Block, RMSNorm


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass over x."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; (..., C) -> (..., C)."""
        if not _plain(x) or not self.fits(x):
            return super().forward(x)
        return native.rms_norm(x.contiguous(), self.weight, self.eps)

    def fits(self, x: Tensor) -> bool:
        """Whether compiled code computes what is asked for."""
        weight = self._parameters["weight"]
        assert weight is not None
        return x.dtype == weight.dtype and not (weight.requires_grad and torch.is_grad_enabled())


class FusedMLP(MLP):
    """SwiGLU with the product of gate and up in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token on its own; (B, T, C) -> (B, T, C)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _plain(gate, up) or gate.shape != up.shape:
            return self.down_proj(self.product(F.silu(gate) * up))
        return self.down_proj(self.product(native.swiglu(gate.contiguous(), up.contiguous())))


class FusedAttention(Attention):
    """RoPE, the cache and `sdpa` in one pass, without a mask: a token sees the slots up to its own."""

    def gather(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: KVCache | None,
    ) -> Tensor:
        """What each head gathers from the tokens that it sees; arguments and result as in `Attention`."""
        heard = any(tap._forward_hooks for tap in (self.q_rot, self.k_rot, self.scores, self.pattern))
        if heard or cache is None or not _plain(q, k, v) or not self.fits(k, cache) or k.shape != v.shape:
            return super().gather(q, k, v, rotation, visible, cache)
        q, k, v, positions = (one.contiguous() for one in (q, k, v, visible.query_positions))
        z = native.attend(q, k, v, *rotation, positions, cache.keys[self.layer], cache.values[self.layer])
        return self.z(z.transpose(1, 2)).transpose(1, 2).flatten(2)

    def fits(self, x: Tensor, cache: KVCache) -> bool:
        """Whether compiled code computes what is asked for."""
        return (
            self.kernel is sdpa
            and type(cache) is KVCache
            and cache.keys.dtype == x.dtype
            and cache.keys.shape[1] == x.shape[0]
            and self.head_dim % native.LANES == 0
        )


class FusedBlock(Block):
    """The whole layer in one call: starting each part takes Python a while, and their values fresh memory."""

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: KVCache | None,
        last: bool = False,
    ) -> Tensor:
        """Add to the residual stream; arguments and result as in `Block`."""
        parts = None if cache is None else self._parts(x, cache)
        if cache is None or parts is None:
            return super().forward(x, rotation, visible, cache, last)
        layer, norms, matrices = parts
        positions = visible.query_positions.contiguous()
        # Who listens to the layer itself wants all of it.
        alone = last and len(x) == 1 and not self._forward_hooks
        return native.layer(
            x.contiguous(),
            norms,
            matrices,
            *rotation,
            positions,
            cache.keys[layer],
            cache.values[layer],
            first=x.shape[1] - 1 if alone else 0,
        )

    def _parts(
        self, x: Tensor, cache: KVCache
    ) -> tuple[int, list[tuple[Tensor, float]], list[tuple[Tensor, Tensor | None]]] | None:
        """Its number, norms and matrices; None where it has to be computed part by part."""
        if not _plain(x):
            return None
        # Not by attribute: a module looks its parts up in 0.4 microseconds each, and a token needs hundreds.
        attention, mlp = self._modules["self_attn"], self._modules["mlp"]
        assert attention is not None
        assert mlp is not None
        inside: dict[str, Any] = {**self._modules, **attention._modules, **mlp._modules}
        # Nobody listens to anything inside, and nothing has been put in another's place.
        for module in inside.values():
            heard = module._forward_hooks or module._forward_pre_hooks
            if heard or type(module) not in OURS or "forward" in module.__dict__:
                return None
        norms, layers = [inside[name] for name in NORMS], [inside[name] for name in MATRICES]
        matrices = [(layer._parameters["weight"], layer._parameters.get("scales")) for layer in layers]
        dtype = matrices[0][0].dtype
        if not (
            inside["self_attn"].fits(x, cache)
            and layers[0].compiled(x)
            and all(layer.in_features % native.GROUP == 0 for layer in layers)
            and all(weight.dtype == dtype for weight, _ in matrices)
            and all(norm.fits(x) for norm in norms)
        ):
            return None
        return inside["self_attn"].layer, [(norm._parameters["weight"], norm.eps) for norm in norms], matrices


def _plain(x: Tensor, *others: Tensor) -> bool:
    """Whether compiled code, which has no gradients, can take them, all in one dtype."""
    return x.dtype in native.STEP_DTYPES and all(
        one.dtype == x.dtype and one.is_cpu and not (one.requires_grad and torch.is_grad_enabled())
        for one in (x, *others)
    )


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    MLP: FusedMLP,
    Attention: FusedAttention,
    Block: FusedBlock,
}
# What a layer that is computed in one call consists of; its norms and matrices, in the order of native.layer.
OURS = {*FUSED.values(), FastLinear, Int8Linear, Tap}
NORMS = ("input_layernorm", "post_attention_layernorm")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fuse(model: nn.Module) -> None:
    """Let a model's layers, and the modules they are made of, be fused where there is a C compiler."""
    if native.available():
        for module in model.modules():
            module.__class__ = FUSED.get(type(module), type(module))
