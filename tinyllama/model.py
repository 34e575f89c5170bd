"""The Llama forward pass, top to bottom: ids -> embeddings -> L blocks -> norm -> logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama import advice, kernels
from tinyllama.attention import Attention, AttentionMask, Kernel, Tap
from tinyllama.cache import KVCache
from tinyllama.config import LlamaConfig
from tinyllama.kernels import Places
from tinyllama.rope import RotaryEmbedding

Step = TypeVar("Step")


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
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and eps, for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, width, bias=False)
        self.up_proj = nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)
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
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: AttentionMask, cache: KVCache | None
    ) -> Tensor:
        """Add to the residual stream `x`, (B, T, C); the other arguments are those of `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Takes decode steps in place of the model where one is set: a recording (see fast/graph.py).
        self.step: Callable[[Tensor, KVCache, Tensor], Tensor] | None = None
        self.sharing: Any = None  # who has what, where processes share the model; see parallel/sharing.py
        self.tie_weights()

    def forward(self, ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits for the token after each of the given ones.

        Args:
            ids: (B, T) token ids.
            cache: holds the keys and values of earlier tokens and takes the new ones, in place. None: the T
                tokens are the whole text, and the pass is differentiable.
            positions: (B, T), each token's position in its row; -1 marks padding. None: the tokens follow
                those in the cache.

        Returns:
            (B, T, V) logits.

        Raises:
            InputError: the ids are no such tensor, or the cache has no room for them.
        """
        return self.lm_head(self.hidden_states(ids, cache, positions))

    def hidden_states(
        self, ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The normalised residual stream that `lm_head` reads, (B, T, C); arguments as in `forward`."""
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise advice.not_a_batch(ids)
        T = ids.shape[1]
        causal = positions is None  # every row ends with the new tokens
        if positions is None:
            start = 0 if cache is None else cache.start(T)
            keys = torch.arange(start + T, device=ids.device)[None]  # (1, S)
            positions = keys[:, start:].expand_as(ids)  # (B, T)
        elif cache is None:
            keys = positions
        else:
            keys = torch.arange(cache.capacity, device=ids.device)[None]
        mask = AttentionMask.of(positions, keys, causal, self.rotary, self.config.sliding_window)
        x = self.embed_tokens(ids).to(self.dtype)  # (B, T, C)
        rotation = self.rotary(positions, x.dtype)
        for block in self.layers:
            x = block(x, rotation, mask, cache)
        if cache is not None:  # only a pass that is done counts
            cache.length = keys.shape[1]
        return self.norm(x)

    def supervise(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of a generation. What makes a model fast puts its checks around them here; see fast/."""
        return steps

    def agree(self, chosen: Tensor) -> Tensor:
        """The ids chosen in a step, (B,). Where processes share the model, the first one's."""
        return chosen if self.sharing is None else self.sharing.ranks.agree(chosen)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens, in the model's dtype, on its device."""
        device = self.embed_tokens.weight.device
        own = (
            {} if self.sharing is None else {"layers": self.sharing.layers, "kv_heads": self.sharing.kv_heads}
        )
        return KVCache(self.config, batch, capacity, dtype=self.dtype, device=device, **own)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; matrices may be stored in fewer bits."""
        return next(self.get_submodule("layers.0.input_layernorm").parameters()).dtype

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def set_attention(self, kernel: Kernel | str, layers: Places = None, heads: Places = None) -> None:
        """Let the given layers and query heads (None: all) attend by `kernel`, the others as before.

        Args:
            kernel: a function (see attention.py), or the name of one, as `lab.load_kernel` takes it.
            layers: `range(8, 22)`, one number, or "8-21".
            heads: likewise.

        Raises:
            InputError: there is no such kernel, layer or head.
        """
        by_layer = {attention.layer: attention for attention in self.attentions}
        kernels.set_attention(by_layer, kernel, layers, heads, self.config.num_attention_heads)

    def tie_weights(self) -> None:
        """Where the config says so, let the head be the embedding: one tensor, two names."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def __getattr__(self, name: str) -> Any:
        """A weight or a part, as in every module; of a name in transformers alone, what it is here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise advice.no_such_name(self, name, advice.OF_A_MODEL) from None

    def num_parameters(self) -> int:
        """How many numbers were trained; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
