"""KVCache: the keys and values of the tokens seen so far, so that each is computed once."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from tinyllama.config import LlamaConfig
from tinyllama.device import check_memory


class KVCache:
    """Preallocated keys and values for every layer; a token at position p lives in slot p.

    The caller owns it: layers write at the positions they are given and never advance anything. Going back
    to an earlier position needs no reset: the slots after it are not read until they are written again.

    Attributes:
        keys: (L, B, K, capacity + 1, D).
        values: (L, B, K, capacity + 1, D).
        visible: how many slots attention reads (S).
        length: in a view by `upto`, how long the rows are, new tokens included; otherwise None.

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
    ) -> None:
        # One slot more than is ever read: padding has position -1, and slot -1 is the last.
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity + 1, config.head_dim)
        check_memory("the KV cache", 2 * math.prod(shape) * dtype.itemsize, torch.device(device))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.visible = capacity
        self.length: int | None = None

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[3] - 1

    @property
    def positions(self) -> Tensor:
        """Those of the visible slots, (1, S)."""
        return torch.arange(self.visible, device=self.keys.device)[None]

    def upto(self, length: int) -> KVCache:
        """The same memory, of which attention reads the first `length` slots only."""
        view = copy(self)
        view.visible = view.length = length
        return view

    def start(self, T: int) -> int:
        """The position of the first of T new tokens that come without positions."""
        return 0 if self.length is None else self.length - T

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values, and return all that are visible.

        Args:
            layer: which layer's.
            positions: (B, T), the slots; -1 for padding.
            k: (B, K, T, D).
            v: (B, K, T, D).

        Returns:
            Keys and values, each (B, K, S, D).
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, positions] = k.transpose(1, 2)
        values[self.rows, :, positions] = v.transpose(1, 2)
        return keys[:, :, : self.visible], values[:, :, : self.visible]
