"""Hints for each step. The first says where to begin, the last is the formula; none is code."""

from __future__ import annotations

HINTS: dict[str, tuple[str, ...]] = {
    "embedding": (
        "An id is the number of a row. Nothing is computed.",
        "A tensor can be indexed by a tensor of integers: the result has one row for each.",
        "y[t] = table[ids[t]]",
    ),
    "rms_norm": (
        "Each token is scaled by itself: the mean runs over its C numbers, not over the tokens.",
        "Nothing is subtracted: LayerNorm would do that. Keep the last axis when you average.",
        "eps stands under the root, and the weight comes last.",
        "y[t, c] = weight[c] * x[t, c] / sqrt(mean over c of x[t, c]^2 + eps)        (arXiv:1910.07467)",
    ),
    "frequencies": (
        "Pair 0 turns by 1 radian a token, and each following pair slower by the same factor.",
        "The last of the D/2 pairs does not quite reach 1/theta.",
        "frequency[i] = theta^(-2i/D), i = 0 ... D/2 - 1        (arXiv:2104.09864, section 3.2.2)",
    ),
    "rope": (
        "The angle of a pair is its frequency times the token's position: a table (T, D/2).",
        "Split a head into two halves, x and y: number i of the first and of the second are a point.",
        "Turning a point by an angle a: x' and y' are sums of a cosine and a sine part. Or let x + iy be "
        "a complex number, and multiply it by one of length 1.",
        "x' = x cos(a) - y sin(a),  y' = y cos(a) + x sin(a),  a = positions[t] * frequencies[i]",
    ),
    "attention": (
        "Work it out for one query head: which KV head serves it, one row of scores, its softmax, one sum.",
        "Query head h reads KV head h // (H/K). The scores are divided by sqrt(D).",
        "With S keys and T queries, query t is token S - T + t, and sees keys 0 to S - T + t.",
        "What may not be seen has a score of -inf before the softmax over the keys.",
        "z[h, t] = sum over s of p[h, t, s] v[g, s],  p[h, t] = softmax over s <= S - T + t of "
        "q[h, t] . k[g, s] / sqrt(D),  g = h // (H/K)        (arXiv:2305.13245)",
    ),
    "swiglu": (
        "Two matrices widen the vector, one narrows it again.",
        "PyTorch keeps a matrix as (out, in), so y = W x of every token is x @ W.T.",
        "SiLU(g) = g / (1 + exp(-g)), of the gate's numbers alone.",
        "y = down (SiLU(gate x) * (up x))        (arXiv:2002.05202, equation 6)",
    ),
    "block": (
        "Two additions to the stream: x + attention(norm(x)), and then the same with the MLP.",
        "The second norm reads the stream after the first addition.",
        "From (T, H*D) to (H, T, D): split the last axis, exchange the first two. After attention, back.",
        "Queries and keys are turned by RoPE, values are not. `remember` comes after that.",
        "x = x + o_proj(attention(rope(q), remember(rope(k), v))) of norm1(x);  x = x + swiglu(norm2(x))",
    ),
    "llama": (
        "Embedding, the layers in their order, one more norm, one more matrix.",
        'The weights of layer 3 have names that begin with "layers.3.": make a dict of them without that. '
        "`remember` may give back what it gets.",
        "logits = lm_head rms_norm(block_L-1( ... block_0(embedding(ids))))",
    ),
    "decode": (
        "It is `llama` with two changes: positions continue, and `remember` keeps what it is given.",
        "How many tokens are in the cache already says where the positions begin.",
        "Each layer has keys and values of its own: put the new ones behind the old ones along the tokens.",
        "keys[l] = concat(keys[l], k),  values[l] = concat(values[l], v),  positions = n, n + 1, ...",
    ),
    "sample": (
        "Temperature 0 is a case of its own: the index of the largest logit.",
        "In this order: temperature, top-k, top-p, softmax, draw. What is left out gets -inf.",
        "For top-p sort by probability: a token stays if those before it have less than p together. So the "
        "one that reaches p stays, and there is always one.",
        "p = softmax(top_p(top_k(logits / temperature))); draw from p",
    ),
}
