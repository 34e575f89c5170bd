"""The Llama forward pass, top to bottom: ids -> embeddings -> L blocks -> norm -> logits."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.attention import Attention, Kernel, Tap, Visibility
from tinyllama.by_head import ByHead
from tinyllama.cache import KVCache
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.fast.split_linear import Linear
from tinyllama.rope import RotaryEmbedding


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467): LayerNorm without mean and bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; (..., C) -> (..., C)."""
        # float32 at least: float16 squares overflow at 256, bfloat16 ones lose the mean.
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and eps, for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, F)
        self.up_proj = Linear(C, F)
        self.down_proj = Linear(F, C)
        self.product = Tap()

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token on its own; (B, T, C) -> (B, T, C)."""
        return self.down_proj(self.product(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One decoder layer: attention moves information between tokens, the MLP works on each."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: KVCache | None,
        last: bool = False,
    ) -> Tensor:
        """Add to the residual stream `x`, (B, T, C).

        With `last` nothing but the last token's stream will be read, so a faster block may give that alone.
        """
        x = x + self.self_attn(self.input_layernorm(x), rotation, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama language model; its parameters carry the names of official checkpoints less `model.`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def forward(self, ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits for the token after each of the given ones.

        Args:
            ids: (B, T) token ids.
            cache: holds the keys and values of earlier positions and takes the new ones, in place. None: the
                T tokens are the whole text, and the pass is differentiable.
            positions: (B, T), each token's position in its row; -1 marks padding. None: 0 to T - 1, or with a
                cache's view `upto` a length, the last T before that length.

        Returns:
            (B, T, V) logits.
        """
        return self.lm_head(self.hidden_states(ids, cache, positions))

    def hidden_states(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """The normalised residual stream that `lm_head` reads, (B, T, C); arguments as in `forward`.

        Generation needs the logits of the last position alone, and V is large. With `last` other positions
        may be left out here, too: in the last layer nobody reads more of them than their keys and values.
        """
        T = ids.shape[1]
        start = 0 if cache is None else cache.start(T)
        S = T if cache is None else cache.visible
        # Without positions the mask may be a plain triangle, or nothing: fused kernels do without one.
        causal, full = positions is None and S == T, positions is None and T == 1 and start + 1 == S
        if positions is None:
            positions = torch.arange(start, start + T, device=ids.device).expand_as(ids)
        x = self.embed_tokens(ids).to(self.dtype)  # (B, T, C)
        rotation = self.rotary(positions, x.dtype)
        keys = positions if cache is None else cache.positions
        visible = Visibility.of(positions, keys, causal, self.rotary, full)
        for block in self.layers:
            x = block(x, rotation, visible, cache, last and block is self.layers[-1])
        return self.norm(x)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens, in the model's dtype, on its device."""
        return KVCache(self.config, batch, capacity, dtype=self.dtype, device=self.embed_tokens.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; matrices may be stored in fewer bits."""
        return self.get_parameter("layers.0.input_layernorm.weight").dtype

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def set_attention(
        self, kernel: Kernel, layers: Iterable[int] | None = None, heads: Iterable[int] | None = None
    ) -> None:
        """Let the given layers and query heads (None: all) attend by `kernel`, the others as before.

        Raises:
            InputError: there is no such layer or head.
        """
        attentions = {attention.layer: attention for attention in self.attentions}
        chosen = _within(layers, "layers", attentions)
        some = None if heads is None else _within(heads, "heads", range(self.config.num_attention_heads))
        if some == []:
            return
        for layer in chosen:
            attention = attentions[layer]
            attention.kernel = kernel if some is None else ByHead(kernel, some, attention.kernel)

    def tie_weights(self) -> None:
        """Where the config says so, let the head be the embedding: one tensor, two names."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def num_parameters(self) -> int:
        """How many numbers were trained; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _within(numbers: Iterable[int] | None, what: str, known: Collection[int]) -> list[int]:
    """The numbers, or all that are known."""
    chosen = list(known if numbers is None else numbers)
    wrong = [number for number in chosen if number not in known]
    if wrong:
        raise InputError(f"{what}: expected 0 to {max(known)}, got {wrong[0]}")
    return chosen
