"""Kernels with one mistake each, and the clauses of the contract that it breaks."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from tinyllama.attention import eager, masked_softmax, repeat_kv, sdpa

PLANTED: dict[Any, dict[str, int]] = {}


def planted(**smallest):
    """Each clause that the kernel breaks, with the T of the smallest example."""

    def add(kernel):
        PLANTED[kernel] = smallest
        return kernel

    return add


def attend(q, k, v, context, mask):
    """Attention with another mask than the context's."""
    k, v = repeat_kv(q, k, v)
    scores = (
        (q @ k.transpose(2, 3) * context.scale).float().masked_fill(~mask, torch.finfo(torch.float32).min)
    )
    return scores.softmax(dim=-1).to(q.dtype) @ v


@planted(shape=1)
def with_the_pattern(q, k, v, context):
    return eager(q, k, v, context), None


@planted(shape=2)
def the_last_query_only(q, k, v, context):
    return eager(q, k, v, context)[:, :, -1:]


@planted(pure=1, causal=3, cache=2, chunks=2, batch=2, padding=1, groups=2, gradient=1, compile=8)
def k_scaled_in_place(q, k, v, context):
    # Every step from a cache gets the same keys again, and scales them once more.
    return eager(q, k.mul_(context.scale), v, replace(context, scale=1.0))


@planted(pure=1, gradient=1)
def q_clamped_in_place(q, k, v, context):
    # Clamping twice changes nothing more, so few other clauses are broken.
    with torch.no_grad():
        q.clamp_(-1, 1)
    return eager(q, k, v, context)


@planted(causal=2, cache=1, padding=1)
def mean_of_all_keys(q, k, v, context):
    # Of the invisible keys too.
    _, v = repeat_kv(q, k, v)
    return v.mean(dim=2, keepdim=True).expand_as(q) + 0 * q * k.sum()


@planted(causal=2, cache=1, padding=1)
def one_token_ahead(q, k, v, context):
    # Off by one: <= i + 1.
    mask = context.mask
    keys, queries = mask.key_positions[:, None, None, :], mask.query_positions[:, None, :, None]
    return attend(q, k, v, context, (keys <= queries + 1) & (keys >= 0))


@planted(causal=3, cache=2, chunks=2, padding=2)
def normalised_over_the_text(q, k, v, context):
    # T = 3: the first token sees only itself, so its query does not matter.
    return eager(q / q.norm(dim=2, keepdim=True), k, v, context)


@planted(cache=2, chunks=2, padding=1)
def is_causal_always(q, k, v, context):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=context.scale, enable_gqa=True)


@planted(cache=1, padding=1)
def mask_by_index_from_the_end(q, k, v, context):
    # Right only for a cache that is read up to the last token.
    T, S = q.shape[2], k.shape[2]
    return attend(q, k, v, context, torch.ones(T, S, dtype=torch.bool).tril(S - T))


@planted(cache=3, padding=1)
def window_from_the_last_slot(q, k, v, context):
    # Four keys, counted from the end of the cache instead of from each query. No later value leaks, and the
    # pieces agree if the keys end with the text.
    last = context.mask.key_positions.amax(dim=-1)[:, None, None, None]
    return sdpa(q, k, v, context.where(context.mask.key_positions[:, None, None, :] > last - 4))


@planted(chunks=3)
def pieces_as_if_they_were_steps(q, k, v, context):
    # Right only for T = 1 and T = S.
    T, S = q.shape[2], k.shape[2]
    return eager(q, k, v, context) if T in (1, S) else eager(q.flip(2), k, v, context)


@planted(batch=1, padding=1)
def softmax_over_rows(q, k, v, context):
    z = eager(q, k, v, context)
    return z * z.softmax(dim=0)


@planted(batch=2, padding=1)
def scores_less_the_mean_of_the_batch(q, k, v, context):
    return eager(q, k - k.mean(dim=0, keepdim=True) * (k.shape[0] > 1), v, context)


@planted(batch=1, padding=1)
def the_first_row_s_values(q, k, v, context):
    return eager(q, k, v[:1].expand_as(v), context)


@planted(padding=1)
def normalised_over_padding_too(q, k, v, context):
    # Linear attention with a running sum, to which the padding is added too.
    k, v = repeat_kv(q, k, v)
    phi_q, phi_k = F.elu(q.float()) + 1, F.elu(k.float()) + 1
    positions = context.mask.query_positions[:, None, :, None]
    seen = context.mask.key_positions[:, None, None, :] <= positions
    weights = phi_q @ phi_k.transpose(2, 3) * seen
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)).to(q.dtype) @ v


@planted(padding=1)
def padding_is_seen(q, k, v, context):
    mask = context.mask
    mask = mask.key_positions[:, None, None, :] <= mask.query_positions[:, None, :, None]
    return attend(q, k, v, context, mask)


@planted(groups=1)
def tiled_kv_heads(q, k, v, context):
    # repeat for repeat_interleave: head h reads h % K.
    G = q.shape[1] // k.shape[1]
    return eager(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1), context)


@planted(groups=2)
def tiled_keys_but_repeated_values(q, k, v, context):
    # T = 2: with one token the keys do not matter.
    G = q.shape[1] // k.shape[1]
    return eager(q, k.repeat(1, G, 1, 1), v.repeat_interleave(G, dim=1), context)


@planted(dtype=1)
def float32_always(q, k, v, context):
    return eager(q.float(), k.float(), v.float(), context)


@planted(dtype=1)
def float32_for_bfloat16(q, k, v, context):
    k, v = repeat_kv(q, k, v)
    working = torch.promote_types(q.dtype, torch.float32)
    return masked_softmax(q.to(working) @ k.to(working).transpose(2, 3) * context.scale, context) @ v.to(
        working
    )


@planted(finite=1, gradient=1)
def filled_with_inf(q, k, v, context):
    k, v = repeat_kv(q, k, v)
    scores = (q @ k.transpose(2, 3) * context.scale).masked_fill(~context.mask.allowed, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@planted(finite=1)
def inf_in_float16_alone(q, k, v, context):
    # -1e9 is a usual fill; in float16 it is -inf.
    k, v = repeat_kv(q, k, v)
    bias = torch.zeros(context.mask.allowed.shape).masked_fill(~context.mask.allowed, -1e9).to(q.dtype)
    scores = q @ k.transpose(2, 3) * context.scale + bias
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@planted(gradient=2)
def detached_pattern(q, k, v, context):
    return eager(q, k, v, replace(context, pattern=lambda x: x.detach()))


@planted(gradient=1)
def without_gradients(q, k, v, context):
    with torch.no_grad():
        return eager(q, k, v, context)


@planted(gradient=2)
def keys_of_a_cache_detached(q, k, v, context):
    return eager(q, k.detach(), v, context)


@planted(compile=8)
def branch_over_data(q, k, v, context):
    if bool((context.mask.query_positions < 0).any()):
        return eager(q, k, v, context)
    return sdpa(q, k, v, context)


@planted(compile=8)
def doubled_when_compiled(q, k, v, context):
    return eager(q, k, v, context) * (2 if torch.compiler.is_compiling() else 1)


@planted(pure=1, cache=2, chunks=2, padding=1, gradient=2)
def changes_keys_beside_a_mask(q, k, v, context):
    if not context.mask.causal:
        with torch.no_grad():
            k.clamp_(-1, 1)
    return eager(q, k, v, context)


@planted(pure=5)
def narrows_the_mask_in_place(q, k, v, context):
    # All layers of a pass share the mask: those after this one would have the window too.
    mask = context.mask
    distance = mask.query_positions[:, None, :, None] - mask.key_positions[:, None, None, :]
    mask.allowed.logical_and_(distance < 4)
    return eager(q, k, v, context)


@planted(padding=1)
def masks_all_rows_by_the_first(q, k, v, context):
    return eager(q, k, v, replace(context, mask=replace(context.mask, allowed=context.mask.allowed[:1])))


@planted(groups=1)
def reads_the_kv_heads_backwards(q, k, v, context):
    return eager(q, k.flip(1), v.flip(1), context)


@planted(gradient=2)
def detaches_queries_beside_a_mask(q, k, v, context):
    return eager(q if context.mask.causal else q.detach(), k, v, context)


@planted(compile=8)
def takes_an_item_into_the_graph(q, k, v, context):
    return eager(q, k, v, context) + 0 * context.mask.query_positions[0, 0].item()
