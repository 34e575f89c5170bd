"""KVCache: the keys and values of the tokens seen so far, so that each is computed once."""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllama.config import LlamaConfig
from tinyllama.device import check_memory
from tinyllama.errors import InputError

if TYPE_CHECKING:
    from tinyllama.attention import AttentionMask


class KVCache:
    """Preallocated keys and values for every layer. The caller owns it.

    `model(ids, cache)` puts the new tokens after the `length` that are there. To go back to an earlier place,
    set `length`: later slots are not read until they are written again.

    `model(ids, cache, positions)` puts each token at the position it is given, for rows of different
    lengths. How long the rows are, only the caller knows then; attention reads the whole capacity behind a
    mask, and `first` gives a smaller view of the same memory to save work.

    `layers` and `kv_heads` are those to keep; None is all of the config's.

    Attributes:
        keys: (L, B, K, 1 + capacity, D). Position p lives in slot p + 1; slot 0 takes what padding writes.
        values: (L, B, K, 1 + capacity, D).
        length: how many tokens of a row the cache holds, as far as it knows.

    Raises:
        InputError: the device has not enough memory free.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        layers: range | None = None,
        kv_heads: range | None = None,
    ) -> None:
        layers = layers or range(config.num_hidden_layers)
        kv_heads = kv_heads or range(config.num_key_value_heads)
        self.first_layer = layers.start
        shape = (len(layers), batch, len(kv_heads), 1 + capacity, config.head_dim)
        check_memory("the KV cache", 2 * math.prod(shape) * dtype.itemsize, torch.device(device))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[3] - 1

    def first(self, capacity: int) -> KVCache:
        """The first slots alone, as a cache of that capacity in the same memory; for use with positions."""
        view = copy(self)
        view.keys, view.values = self.keys[..., : 1 + capacity, :], self.values[..., : 1 + capacity, :]
        self.length = max(self.length, capacity)  # whatever the view writes lies within
        return view

    def start(self, T: int) -> int:
        """The position of the first of T new tokens, which follow those that are there.

        Raises:
            InputError: there is no room for them.
        """
        if self.length + T > self.capacity:
            raise InputError(
                f"cache: {self.length} of {self.capacity} slots are taken, so {T} new tokens do not fit; "
                "make a larger one, set cache.length to go back, or give positions"
            )
        return self.length

    def write(self, layer: int, mask: AttentionMask, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values, and return all that attention may read.

        Args:
            layer: which layer's.
            mask: says at which positions the T new tokens stand, and how many are read (S).
            k: (B, K, T, D).
            v: (B, K, T, D).

        Returns:
            Keys and values, each (B, K, S, D).
        """
        T, S = mask.allowed.shape[-2:]
        keys, values = self.keys[layer - self.first_layer], self.values[layer - self.first_layer]
        if mask.causal:  # every row ends with its T new tokens: a slice, written twice as fast as by index
            keys.narrow(2, 1 + S - T, T).copy_(k)
            values.narrow(2, 1 + S - T, T).copy_(v)
        else:
            slots = 1 + mask.query_positions  # (B, T)
            keys[self.rows, :, slots], values[self.rows, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
        return keys.narrow(2, 1, S), values.narrow(2, 1, S)
