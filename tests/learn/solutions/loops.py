"""A right Llama in loops over single numbers, as somebody writes it who knows Python and no PyTorch."""

import math

import torch


def embedding(ids, table):
    return [table[int(one)] for one in ids]


def rms_norm(x, weight, eps):
    rows = []
    for row in x.tolist():
        total = 0.0
        for number in row:
            total += number * number
        root = math.sqrt(total / len(row) + eps)
        rows.append([number / root * float(w) for number, w in zip(row, weight, strict=True)])
    return rows


def frequencies(head_dim, theta):
    return [math.exp(-2 * i / head_dim * math.log(theta)) for i in range(head_dim // 2)]


def rope(x, positions, frequencies):
    heads, half = x.tolist(), x.shape[2] // 2
    for head in heads:
        for t, row in enumerate(head):
            for i in range(half):
                angle = int(positions[t]) * float(frequencies[i])
                a, b = row[i], row[i + half]
                row[i] = a * math.cos(angle) - b * math.sin(angle)
                row[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return torch.tensor(heads)


def attention(q, k, v):
    (heads, new, size), (kv_heads, old, _) = q.shape, k.shape
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    z = torch.zeros(heads, new, size)
    for h in range(heads):
        g = h // (heads // kv_heads)
        for t in range(new):
            sees = old - new + t + 1
            scores = [
                sum(a * b for a, b in zip(q[h][t], k[g][s], strict=True)) / size**0.5 for s in range(sees)
            ]
            top = max(scores)
            shares = [math.exp(score - top) for score in scores]
            for s in range(sees):
                for d in range(size):
                    z[h, t, d] += shares[s] / sum(shares) * v[g][s][d]
    return z


def times(x, matrix):
    x, matrix = x.tolist(), matrix.tolist()
    return torch.tensor([[sum(a * b for a, b in zip(row, w, strict=True)) for w in matrix] for row in x])


def swiglu(x, gate, up, down):
    wide = []
    for g, u in zip(times(x, gate).tolist(), times(x, up).tolist(), strict=True):
        wide.append([a / (1 + math.exp(-a)) * b for a, b in zip(g, u, strict=True)])
    return times(torch.tensor(wide), down)


def block(x, weights, config, positions, remember):
    h = torch.as_tensor(rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps))
    heads = {}
    for name in "qkv":
        flat = times(h, weights[f"self_attn.{name}_proj.weight"])
        count = flat.shape[1] // config.head_dim
        heads[name] = torch.stack(
            [flat[:, i * config.head_dim : (i + 1) * config.head_dim] for i in range(count)]
        )
    speeds = torch.as_tensor(frequencies(config.head_dim, config.rope_theta))
    q, k = (torch.as_tensor(rope(heads[name], positions, speeds)) for name in "qk")
    k, v = remember(k, heads["v"])
    z = torch.cat(list(attention(q, k, v)), dim=1)
    x = x + times(z, weights["self_attn.o_proj.weight"])
    h = torch.as_tensor(rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps))
    return x + swiglu(h, *(weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def llama(ids, weights, config):
    return decode(ids, weights, config, {})


def decode(ids, weights, config, cache):
    past = cache.setdefault("past", [None] * config.num_hidden_layers)
    start = cache.setdefault("length", 0)
    cache["length"] += len(ids)
    x = embedding(ids, weights["embed_tokens.weight"])
    x = torch.stack(x) if isinstance(x, list) else x
    for layer in range(config.num_hidden_layers):

        def remember(k, v, layer=layer):
            if past[layer] is None:
                past[layer] = k, v
            else:
                past[layer] = tuple(torch.cat(pair, dim=1) for pair in zip(past[layer], (k, v), strict=True))
            return past[layer]

        own = {}
        for name, weight in weights.items():
            if name.startswith(f"layers.{layer}."):
                own[name.replace(f"layers.{layer}.", "", 1)] = weight
        x = block(x, own, config, torch.arange(start, start + len(ids)), remember)
    x = torch.as_tensor(rms_norm(x, weights["norm.weight"], config.rms_norm_eps))
    return times(x, weights["lm_head.weight"])


def sample(logits, temperature, top_k, top_p, generator):
    ranked = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    if temperature == 0:
        return ranked[0]
    ranked = ranked[: top_k or len(ranked)]
    sizes = [math.exp((float(logits[i]) - float(logits[ranked[0]])) / temperature) for i in ranked]
    total, mass, kept = sum(sizes), 0.0, []
    for i, size in zip(ranked, sizes, strict=True):
        if mass < top_p:
            kept.append((i, size))
        mass += size / total
    # A draw of one's own: a number along the sum of the sizes.
    point = torch.rand(1, generator=generator).item() * sum(size for _, size in kept)
    for i, size in kept:
        point -= size
        if point <= 0:
            return i
    return kept[-1][0]
