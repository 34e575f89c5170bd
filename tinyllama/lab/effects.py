"""What a change does inside the model: to each head, to each layer, and to the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from tinyllama.attention import AttentionContext, Kernel, sdpa
from tinyllama.hooks import capture
from tinyllama.lab.change import Change
from tinyllama.lab.clauses import broken_clauses
from tinyllama.lab.figures import Cache
from tinyllama.lab.keeping import kept_bytes
from tinyllama.model import Llama

RESIDUAL = "layers.*"
HEADS = "layers.*.self_attn.z"


def relative_change(value: Tensor, before: Tensor) -> Tensor:
    """|value - before| / |before|, mean over tokens: (..., T, C) -> (...); 1 where only `before` is zero."""
    change, length = (value - before).norm(dim=-1), before.norm(dim=-1)
    return torch.where(length > 0, change / length, (change > 0).to(change)).mean(dim=-1)


@torch.no_grad()
def observe(model: Llama, ids: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """One pass: logits (T, V), and by address each layer's residual stream and each head's output."""
    device = model.embed_tokens.weight.device
    with capture(model, RESIDUAL, HEADS, whole=True) as values:
        logits = model(torch.tensor([list(ids)], device=device))
    return logits[0], {address: value[0] for address, value in values.items()}


def total_changes(values: dict[str, Tensor], before: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Relative changes between two passes: of each layer's residual stream (L,) and head's output (L, H)."""
    moved = {address: relative_change(value, before[address]).cpu() for address, value in values.items()}
    heads = [moved[address] for address in moved if address.endswith(".z")]
    return torch.stack([moved[address] for address in moved if address[-1] != "z"]), torch.stack(heads)


@torch.no_grad()
def direct_changes(model: Llama, changes: Sequence[Change], ids: Sequence[int]) -> list[Tensor]:
    """The relative change of each head's output when that head alone is changed: (L, H) for each change.

    In one pass of the unchanged model, every changed kernel gets the queries, keys and values of the model's
    own kernel, and the two outputs are compared.
    """
    L, H = model.config.num_hidden_layers, model.config.num_attention_heads
    moved = [torch.zeros(L, H) for _ in changes]

    def beside(own: Kernel) -> Kernel:
        def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
            z = own(q, k, v, context)
            for change, result in zip(changes, moved, strict=True):
                if context.layer in change:
                    other = change.kernel(q, k, v, context.untapped())
                    for head, figure in zip(context.heads, relative_change(other, z)[0].cpu(), strict=True):
                        if change.heads is None or head in change.heads:
                            result[context.layer, head] = figure
            return z

        return attend

    with _wrapped(model, beside):
        model(torch.tensor([list(ids)], device=model.embed_tokens.weight.device))
    return [_of_all_ranks(model, one) for one in moved]


@torch.no_grad()
def keys_needed(model: Llama, ids: Sequence[int]) -> float | None:
    """The share of the keys of a text's first half that its second half still reads: a cache must keep these.

    A key is read if the gradient of some later output by its value is not zero. None if a kernel declares
    that it breaks "gradient".
    """
    half = len(ids) // 2
    reads = torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads, half)

    def measured(own: Kernel) -> Kernel:
        def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
            with torch.enable_grad():
                values = v.detach().requires_grad_()
                z = own(q, k, values, context)
                weights = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
                later = (z * weights)[:, :, half:].sum()
                read = torch.autograd.grad(later, values)[0] if z.requires_grad else torch.zeros_like(v)
            reads[context.layer, _kv_heads(model, k, context)] = (
                (read[0, :, :half] != 0).any(dim=-1).to(reads)
            )
            return z.detach()

        return attend

    if any("gradient" in broken_clauses(attention.kernel) for attention in model.attentions):
        return None
    with _wrapped(model, measured):
        model(torch.tensor([list(ids)], device=model.embed_tokens.weight.device))
    return _of_all_ranks(model, reads).double().mean().item()


@torch.no_grad()
def cache_needed(model: Llama, ids: Sequence[int]) -> Cache:
    """What a cache has to keep of a text's first half for its second half."""
    shape = 2, model.config.num_hidden_layers, model.config.num_key_value_heads
    sizes = torch.zeros(shape, dtype=torch.float64)  # kept, and plain: at the first of some KV heads, of all

    def measured(own: Kernel) -> Kernel:
        def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
            place = context.layer, _kv_heads(model, k, context)[0]
            for size, kernel in zip(sizes, (own, sdpa), strict=True):
                size[place] = kept_bytes(kernel, q, k, v, context)
            return own(q, k, v, context)

        return attend

    with _wrapped(model, measured):
        model(torch.tensor([list(ids)], device=model.embed_tokens.weight.device))
    kept, plain = _of_all_ranks(model, sizes).sum(dim=(1, 2)).tolist()
    needed, share = keys_needed(model, ids), kept / plain
    half = len(ids) // 2
    all_of_it = share * (1.0 if needed is None else needed)
    return Cache(half, needed, share, round(all_of_it * plain * half / len(ids)), all_of_it)


def _kv_heads(model: Llama, k: Tensor, context: AttentionContext) -> list[int]:
    """Which KV heads a kernel's keys are of."""
    first = context.heads.start * model.config.num_key_value_heads // context.num_heads
    return list(range(first, first + k.shape[1]))


def _of_all_ranks(model: Llama, figures: Tensor) -> Tensor:
    """Figures of all layers and heads; where processes share the model, each has filled in its own."""
    return figures if model.sharing is None else model.sharing.union(figures)


@contextmanager
def _wrapped(model: Llama, wrap: Callable[[Kernel], Kernel]) -> Iterator[None]:
    """Every layer's kernel replaced by `wrap` of it while the block runs."""
    with ExitStack() as swaps:
        for attention in model.attentions:
            change = Change("wrapped", wrap(attention.kernel), (attention.layer,))
            swaps.enter_context(change.applied(model))
        yield
