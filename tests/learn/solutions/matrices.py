"""A right Llama in matrix products: the one into which the tests plant mistakes."""

import torch


def embedding(ids, table):
    return table[ids]


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def frequencies(head_dim, theta):
    return 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)


def rope(x, positions, frequencies):
    a = torch.einsum("t,i->ti", positions.float(), frequencies)
    u, v = x.chunk(2, -1)
    return torch.cat((u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()), -1)


def attention(q, k, v):
    H, T, D = q.shape
    K, S, _ = k.shape
    q = q.reshape(K, H // K, T, D)
    s = torch.einsum("kgtd,ksd->kgts", q, k) / D**0.5
    s = s.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), float("-inf"))
    return torch.einsum("kgts,ksd->kgtd", s.softmax(-1), v).reshape(H, T, D)


def swiglu(x, gate, up, down):
    g = x @ gate.T
    return (g / (1 + (-g).exp()) * (x @ up.T)) @ down.T


def block(x, weights, config, positions, remember):
    D = config.head_dim

    def w(name):
        return weights[name + ".weight"]

    h = rms_norm(x, w("input_layernorm"), config.rms_norm_eps)
    q, k, v = [(h @ w(f"self_attn.{n}_proj").T).unflatten(1, (-1, D)).transpose(0, 1) for n in "qkv"]
    f = frequencies(D, config.rope_theta)
    q, k = rope(q, positions, f), rope(k, positions, f)
    k, v = remember(k, v)
    z = attention(q, k, v).transpose(0, 1).flatten(1)
    x = x + z @ w("self_attn.o_proj").T
    h = rms_norm(x, w("post_attention_layernorm"), config.rms_norm_eps)
    return x + swiglu(h, w("mlp.gate_proj"), w("mlp.up_proj"), w("mlp.down_proj"))


def llama(ids, weights, config):
    positions = torch.arange(len(ids))
    x = embedding(ids, weights["embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}."
        own = {name[len(at) :]: weight for name, weight in weights.items() if name.startswith(at)}
        x = block(x, own, config, positions, lambda k, v: (k, v))
    return rms_norm(x, weights["norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def decode(ids, weights, config, cache):
    start = cache.get("n", 0)
    cache["n"] = start + len(ids)
    positions = torch.arange(start, start + len(ids))
    x = embedding(ids, weights["embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):

        def remember(k, v, layer=layer):
            if layer in cache:
                k, v = torch.cat((cache[layer][0], k), 1), torch.cat((cache[layer][1], v), 1)
            cache[layer] = k, v
            return k, v

        at = f"layers.{layer}."
        own = {name[len(at) :]: weight for name, weight in weights.items() if name.startswith(at)}
        x = block(x, own, config, positions, remember)
    return rms_norm(x, weights["norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def sample(logits, temperature, top_k, top_p, generator):
    if temperature == 0:
        return logits.argmax()
    x = logits / temperature
    if top_k:
        x = x.masked_fill(x < x.topk(top_k).values[-1], float("-inf"))
    if top_p < 1:
        p, order = x.softmax(-1).sort(descending=True)
        out = p.cumsum(0) - p >= top_p
        x = x.masked_fill(torch.zeros_like(out).scatter(0, order, out), float("-inf"))
    return torch.multinomial(x.softmax(-1), 1, generator=generator).item()
