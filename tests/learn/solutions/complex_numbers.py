"""A right Llama with RoPE as a product of complex numbers, and sums written by einsum."""

import numpy as np
import torch
from torch.nn import functional as F


def embedding(ids, table):
    return torch.einsum("tv,vc->tc", F.one_hot(ids, len(table)).to(table.dtype), table)


def rms_norm(x, weight, eps):
    power = torch.einsum("tc,tc->t", x, x) / x.shape[1]
    return torch.einsum("tc,t,c->tc", x, (power + eps) ** -0.5, weight)


def frequencies(head_dim, theta):
    return np.power(theta, -np.arange(0, head_dim, 2) / head_dim)


def rope(x, positions, frequencies):
    turns = torch.polar(torch.ones(()), torch.outer(positions.float(), torch.as_tensor(frequencies).float()))
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(q, k, v):
    groups = len(q) // len(k)
    k, v = (torch.einsum("ksd,kg->kgsd", x, torch.ones(len(x), groups)).flatten(0, 1) for x in (k, v))
    T, S = q.shape[1], k.shape[1]
    future = torch.arange(S) > torch.arange(S - T, S)[:, None]
    scores = torch.einsum("htd,hsd->hts", q, k) / q.shape[-1] ** 0.5 - 1e30 * future
    sizes = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("hts,hsd,ht->htd", sizes, v, 1 / sizes.sum(-1))


def swiglu(x, gate, up, down):
    wide = F.silu(torch.einsum("tc,fc->tf", x, gate)) * torch.einsum("tc,fc->tf", x, up)
    return torch.einsum("tf,cf->tc", wide, down)


def block(x, weights, config, positions, remember):
    h = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = (
        torch.einsum(
            "tc,hdc->htd", h, weights[f"self_attn.{name}_proj.weight"].unflatten(0, (-1, config.head_dim))
        )
        for name in "qkv"
    )
    speeds = frequencies(config.head_dim, config.rope_theta)
    k, v = remember(rope(k, positions, speeds), v)
    z = attention(rope(q, positions, speeds), k, v)
    out = weights["self_attn.o_proj.weight"].unflatten(1, (-1, config.head_dim))
    x = x + torch.einsum("htd,chd->tc", z, out)
    h = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    return x + swiglu(h, *(weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def layers(ids, weights, config, positions, past):
    x = embedding(ids, weights["embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        own = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        x = block(x, own, config, positions, past(layer))
    x = rms_norm(x, weights["norm.weight"], config.rms_norm_eps)
    return torch.einsum("tc,vc->tv", x, weights["lm_head.weight"])


def llama(ids, weights, config):
    return layers(ids, weights, config, torch.arange(len(ids)), lambda layer: lambda k, v: (k, v))


def decode(ids, weights, config, cache):
    def past(layer):
        def remember(k, v):
            cache[layer] = [torch.cat((old, new), 1) for old, new in zip(cache[layer], (k, v), strict=True)]
            return cache[layer]

        cache.setdefault(layer, [torch.zeros(config.num_key_value_heads, 0, config.head_dim)] * 2)
        return remember

    start = cache[0][0].shape[1] if 0 in cache else 0
    return layers(ids, weights, config, torch.arange(start, start + len(ids)), past)


def sample(logits, temperature, top_k, top_p, generator):
    if temperature == 0:
        return int(logits.argmax())
    p = (logits / temperature).softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.zeros(len(p), dtype=torch.bool)
    keep[order[: top_k or None]] = True
    p = torch.where(keep, p, 0) / p[keep].sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= top_p]] = 0
    return torch.multinomial(p / p.sum(), 1, generator=generator)
