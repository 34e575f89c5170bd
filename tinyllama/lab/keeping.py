"""What a kernel keeps of keys and values, and the bytes that a KV cache of it would need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tinyllama.attention import AttentionContext, Kernel
from tinyllama.kernels import ByHead

Keep = Callable[..., tuple[Tensor, ...]]


def keeps(keep: Keep) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a kernel of two functions: what is kept of keys and values, and attention by that alone.

        @keeps(codes)  # codes(k, v, context, *, bits=4) -> tensors
        def four_bits(q, kept, context, *, bits=4): ...

    The scorecard counts the bytes of what is kept, so no kernel can claim fewer than it uses. The project's
    own cache still holds keys and values: this measures an idea before a cache is written for it. Settings
    are given to both functions. `breaks` goes above it.

    Args:
        keep: gets keys and values (B, K, S, D), the context and the settings, and returns a tuple of tensors.
    """

    def declare(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(attend)
        def kernel(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, **settings: Any) -> Tensor:
            return attend(q, keep(k, v, context, **settings), context, **settings)

        context_and_settings = list(inspect.signature(attend).parameters.values())[2:]
        keys_and_values = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in "qkv"]
        kernel.__signature__ = inspect.Signature(keys_and_values + context_and_settings)  # type: ignore[attr-defined]
        kernel.keep = keep  # type: ignore[attr-defined]
        return kernel

    return declare


def kept_bytes(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, **settings: Any
) -> float:
    """Bytes that a kernel keeps of these keys and values; all of them unless it says otherwise by `keeps`.

    Where kernels go by head, a KV head counts for each kernel that reads it.
    """
    if isinstance(kernel, functools.partial):
        return kept_bytes(kernel.func, q, k, v, context, **kernel.keywords, **settings)
    if isinstance(kernel, ByHead):
        H, K = q.shape[1], k.shape[1]
        # Heads as this process counts them, which may have some of the layer's only.
        chosen = [n for n, head in enumerate(context.heads) if head in kernel.heads]
        others = [n for n in range(H) if n not in chosen]
        readers = ((kernel.kernel, chosen), (kernel.others, others))
        return sum(
            kept_bytes(one, q, k, v, context) * len({n * K // H for n in heads}) / K for one, heads in readers
        )
    keep = getattr(kernel, "keep", None)
    kept = (k, v) if keep is None else keep(k, v, context, **settings)
    return sum(part.numel() * part.element_size() for part in kept)
