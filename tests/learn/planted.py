"""Classical mistakes, planted into the right solution: what is replaced by what, and the name expected."""

from __future__ import annotations

HALF_ROOT = "torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)"
TURNED = "torch.cat((u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()), -1)"
MASK = "torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)"
GATED = "(g / (1 + (-g).exp()) * (x @ up.T)) @ down.T"
SCALED = "x = logits / temperature"
PENULTIMATE = 'h = rms_norm(x, w("post_attention_layernorm"), config.rms_norm_eps)'

# step -> (old, new, a part of the suspect's name)
PLANTED: dict[str, list[tuple[str, str, str]]] = {
    "embedding": [
        ("table[ids]", "table[ids] * table.shape[1] ** 0.5", "scaled by sqrt(hidden_size)"),
        ("table[ids]", "table[torch.arange(len(ids))]", "the place of a token is looked up"),
        ("table[ids]", "table[ids - 1]", "ids are counted from 1"),
        ("table[ids]", "torch.nn.functional.normalize(table[ids], dim=-1)", "vectors are normalised"),
        ("table[ids]", "table[ids].sum(0)", "all vectors are added up"),
        ("table[ids]", "torch.nn.functional.one_hot(ids, len(table))", "one-hot vectors"),
        ("table[ids]", "table[ids].half()", "rounded to float16"),
        ("table[ids]", "table[ids.roll(1).where(torch.arange(len(ids)) > 0, ids)]", "one too many in front"),
    ],
    "rms_norm": [
        (
            f"x * {HALF_ROOT}",
            "(x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()",
            "the mean is subtracted",
        ),
        ("* weight", "* (1 + weight)", "norm weight is applied as 1 + w"),
        (
            f"x * {HALF_ROOT}",
            "(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)",
            "as in LayerNorm, and std divides by C - 1",
        ),
        (f"x * {HALF_ROOT}", "x / x.std(-1, keepdim=True)", "std subtracts the mean"),
        (" * weight", "", "norm weight is not applied"),
        ("mean(-1, keepdim=True)", "mean(0)", "the mean runs over the tokens"),
        ("mean(-1, keepdim=True)", "mean()", "the mean runs over the whole text"),
        ("mean(-1, keepdim=True)", "sum(-1, keepdim=True)", "the sum is taken for the mean"),
        (HALF_ROOT, "1 / (x.pow(2).mean(-1, keepdim=True) + eps)", "the root is left out"),
        (HALF_ROOT, "1 / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)", "eps is added to the root"),
        ("+ eps", "+ 1e-6", "eps is 1e-06, not 1e-05"),
        (
            f"x * {HALF_ROOT} * weight",
            "(x.half() * x.half().pow(2).mean(-1, keepdim=True).add(eps).rsqrt() * weight.half()).float()",
            "the norm is computed in float16",
        ),
    ],
    "frequencies": [
        ("2) / head_dim", "2) / 2 / head_dim", "the exponent is i/D"),
        ("2) / head_dim", "2) * 2 / head_dim", "the exponent is 4i/D"),
        ("1.0 / theta", "theta", "the exponent has no minus"),
        ("(0, head_dim, 2)", "(2, head_dim + 1, 2)", "pairs are counted from 1"),
        ("theta **", "10000.0 **", "theta is 10000 whatever"),
        (
            "1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)",
            "(1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)).repeat(2)",
            "stands there twice",
        ),
        ("1.0 / theta", "2 * torch.pi / theta", "turns for radians"),
        ("1.0 / theta", "180 / torch.pi / theta", "degrees"),
        ("(0, head_dim, 2)", "(0, head_dim + 1, 2)", "one too many"),
    ],
    "rope": [
        (
            TURNED,
            "torch.stack((x[..., ::2] * a.cos() - x[..., 1::2] * a.sin(), x[..., 1::2] * a.cos() + "
            "x[..., ::2] * a.sin()), -1).flatten(-2)",
            "interleaved",
        ),
        (TURNED, "x", "RoPE is not applied"),
        (
            TURNED,
            "torch.cat((u * a.cos() + v * a.sin(), v * a.cos() - u * a.sin()), -1)",
            "turns the other way",
        ),
        ("positions.float()", "(positions + 1).float()", "positions start at 1"),
        ("positions.float()", "torch.arange(len(positions)).float()", "it always begins at 0"),
        (
            'torch.einsum("t,i->ti", positions.float(), frequencies)',
            "positions.bfloat16()[:, None] * frequencies.bfloat16()",
            "angles are computed in bfloat16",
        ),
        (TURNED, "u * a.cos() - v * a.sin()", "the first number of each pair alone"),
    ],
    "attention": [
        ("/ D**0.5", "/ D", "1/head_dim"),
        (" / D**0.5", "", "scaled by 1 (none)"),
        (MASK, "torch.zeros(T, S, dtype=torch.bool)", "nothing is masked"),
        (MASK, "torch.ones(T, S, dtype=torch.bool).triu(S - T + 2)", "mask leaks one token"),
        (MASK, "torch.ones(T, S, dtype=torch.bool).triu(1)", "the mask begins at the first key"),
        ("s.softmax(-1)", "s.softmax(-2).nan_to_num()", "softmax runs over the queries"),
        ('float("-inf")', "0.0", "masked scores are 0, not -inf"),
        (
            "q = q.reshape(K, H // K, T, D)",
            "k, v, q = k.repeat(H // K, 1, 1), v.repeat(H // K, 1, 1), q[:, None]",
            "KV heads are tiled",
        ),
        (".reshape(H, T, D)", ".reshape(H, T, D).transpose(0, 1)", "heads and tokens are exchanged"),
        (".reshape(H, T, D)", ".reshape(H, T, D).transpose(0, 1).flatten(1)", "heads are merged already"),
    ],
    "swiglu": [
        (
            "(g / (1 + (-g).exp()) * (x @ up.T))",
            "(torch.nn.functional.silu(x @ up.T) * g)",
            "gate and up are swapped",
        ),
        ("g / (1 + (-g).exp())", "torch.nn.functional.gelu(g)", "GELU is used for SiLU"),
        ("g / (1 + (-g).exp())", "g.relu()", "ReLU is used for SiLU"),
        ("g / (1 + (-g).exp())", "g.sigmoid()", "a sigmoid is used for SiLU"),
        ("g / (1 + (-g).exp())", "g", "the gate has no activation"),
        (" * (x @ up.T)", "", "up is left out"),
        (" @ down.T", "", "down is left out"),
    ],
    "block": [
        ("x = x + z @", "x = z @", "attention's output replaces the stream"),
        ("return x + swiglu", "return swiglu", "the MLP's output alone is passed on"),
        (PENULTIMATE, "h = x", "the norm before the MLP is left out"),
        (
            'h = rms_norm(x, w("input_layernorm"), config.rms_norm_eps)',
            "h = x",
            "the norm before attention is left out",
        ),
        (
            'return weights[name + ".weight"]',
            'return weights[{"input_layernorm": "post_attention_layernorm", '
            '"post_attention_layernorm": "input_layernorm"}.get(name, name) + ".weight"]',
            "the two norms are swapped",
        ),
        (
            'x = x + z @ w("self_attn.o_proj").T\n    h = rms_norm(x,',
            'y = x\n    x = x + z @ w("self_attn.o_proj").T\n    h = rms_norm(y,',
            "the MLP reads the layer's input",
        ),
        ("q, k = rope(q, positions, f), rope(k, positions, f)", "pass", "RoPE is not applied"),
        ("rope(k, positions, f)", "k", "RoPE turns the queries alone"),
        ("k, v = remember(k, v)", "k, v = remember(k, rope(v, positions, f))", "RoPE turns the values, too"),
        ("k, v = remember(k, v)", "remember(k, v)", "what `remember` gives is not used"),
        ('z @ w("self_attn.o_proj").T', "z", "o_proj is left out"),
        (
            "f = frequencies(D, config.rope_theta)",
            "f, positions = frequencies(D, 1e4), torch.arange(len(x))",
            "positions are not used",
        ),
    ],
    "llama": [
        ('rms_norm(x, weights["norm.weight"], config.rms_norm_eps)', "x", "the final norm is left out"),
        (
            "range(config.num_hidden_layers)",
            "range(config.num_hidden_layers - 1)",
            "the last layer is left out",
        ),
        (
            "range(config.num_hidden_layers)",
            "range(1, config.num_hidden_layers)",
            "the first layer is left out",
        ),
        (
            "range(config.num_hidden_layers)",
            "reversed(range(config.num_hidden_layers))",
            "the layers run backwards",
        ),
        ('f"layers.{layer}."', '"layers.0."', "every layer has the weights of the first"),
        ('"lm_head.weight"', '"embed_tokens.weight"', "the embedding's table is used for the head"),
        (' @ weights["lm_head.weight"].T', "", "the head is left out"),
        (
            'rms_norm(x, weights["norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T',
            '(rms_norm(x, weights["norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T).softmax(-1)',
            "softmax is applied",
        ),
        ("return rms_norm(x,", "return rms_norm(x[-1:],", "the logits of the last token alone"),
    ],
    "decode": [
        ('start = cache.get("n", 0)', "start = 0", "positions begin at 0 in each call"),
        (
            "arange(start, start + len(ids))",
            "arange(start, start + len(ids)) - int(start > 0)",
            "positions are one behind",
        ),
        ("if layer in cache:", "if False:", "were overwritten"),
        ("layer=layer", "layer=0", "all layers share one cache"),
        (
            "return k, v\n",
            "return (k[:, :-1], v[:, :-1]) if start else (k, v)\n",
            "a new token does not see itself",
        ),
        ("cache[layer] = k, v", "cache.setdefault(layer, (k, v))", "only the prompt is cached"),
        ("return rms_norm(x,", "return rms_norm(x[-1:],", "the last token of each call alone"),
    ],
    "sample": [
        (SCALED, "x = logits * temperature", "the temperature multiplies"),
        (SCALED, "x = logits", "the temperature is ignored"),
        ("if top_k:", "if False:", "top-k is ignored"),
        ("if top_p < 1:", "if False:", "top-p is ignored"),
        ("x.topk(top_k)", "x.topk(top_k + 1)", "top-k keeps one token more"),
        ("x < x.topk", "x <= x.topk", "top-k keeps one token less"),
        (
            "p.cumsum(0) - p >= top_p",
            "(p.cumsum(0) >= top_p) & (p < p.max())",
            "top-p leaves out the token that reaches p",
        ),
        ("descending=True", "descending=False", "top-p keeps the least likely"),
        ("if temperature == 0:", "if True:", "the most likely token always wins"),
        ('float("-inf")', "0.0", "what is out has logit 0"),
        (
            "return torch.multinomial(x.softmax(-1)",
            "return torch.multinomial(x.softmax(-1).softmax(-1)",
            "softmax is applied twice",
        ),
    ],
}
