"""What well-known mistakes give where a learner makes them: beside those that parity knows, by function.

Each generator yields pairs of a name and a value in float64, the right one first under the name "".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.config import LlamaConfig
from tinyllama.learn import ours
from tinyllama.parity.scene import Suspects

Weights = Mapping[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Suspects:
    """Of an RMSNorm; parity knows more."""
    square = x.square()
    yield (
        "the mean runs over the tokens, not over a token's numbers",
        x / (square.mean(0) + eps).sqrt() * weight,
    )
    centred, deviation = x - x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    yield "the mean is subtracted, as in LayerNorm, and std divides by C - 1", centred / deviation * weight
    yield "std subtracts the mean before it squares", x / deviation * weight
    yield "the root is left out", x / (square.mean(-1, keepdim=True) + eps) * weight
    yield "the sum is taken for the mean", x / (square.sum(-1, keepdim=True) + eps).sqrt() * weight
    yield "the squares are left out: it divides by the mean size", x / x.abs().mean(-1, keepdim=True) * weight
    yield "the mean runs over the whole text", x / (square.mean() + eps).sqrt() * weight


def frequencies(head_dim: int, theta: float) -> Suspects:
    """Of RoPE's frequencies, (D/2,)."""
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    right = theta ** (-2 * pair / head_dim)
    yield "", right
    yield "the exponent is i/D, not 2i/D", theta ** (-pair / head_dim)
    yield "the exponent is 4i/D, not 2i/D: i runs in steps of 2 already", theta ** (-4 * pair / head_dim)
    yield "the exponent has no minus: these are 1/frequency", 1 / right
    yield "pairs are counted from 1", theta ** (-2 * (pair + 1) / head_dim)
    yield "they run backwards", right.flip(0)
    yield "they are multiplied by 2 pi: turns for radians", right * 2 * math.pi
    yield "they are in degrees", right * 180 / math.pi
    yield "they fall in a straight line, not by a power", 1 - pair / (head_dim // 2)
    yield "theta is 10000 whatever was given", 10000.0 ** (-2 * pair / head_dim)
    yield "the last pair turns by 1/theta exactly: D - 2 stands for D", theta ** (-2 * pair / (head_dim - 2))


def rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Suspects:
    """Of a text that does not begin at 0; parity knows what is wrong at the beginning already."""
    first = torch.arange(len(positions))
    yield "", ours.rope(x, positions, frequencies)
    yield "positions are not used: it always begins at 0", ours.rope(x, first, frequencies)
    yield "positions start at 1", ours.rope(x, positions + 1, frequencies)
    yield (
        "every token turns by the first position",
        ours.rope(x, positions[:1].expand_as(positions), frequencies),
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Suspects:
    """Of attention, whether or not the queries follow cached tokens (T < S)."""
    (H, T, D), (K, S, _) = q.shape, k.shape
    repeated, tiled, first = k.repeat_interleave(H // K, 0), k.repeat(H // K, 1, 1), k[:1]
    scores = q @ repeated.mT / math.sqrt(D)
    values = v.repeat_interleave(H // K, 0)
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)

    def seen(visible: Tensor = visible, scores: Tensor = scores, values: Tensor = values) -> Tensor:
        return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num() @ values

    yield "", seen()
    upper_left = torch.ones(T, S, dtype=torch.bool).tril()
    yield "the mask begins at the first key, but the queries are those of the last T tokens", seen(upper_left)
    yield "nothing is masked: a token sees the future", seen(torch.ones_like(visible))
    yield "a query sees the new tokens alone, not the cached ones", seen(visible.triu(S - T))
    yield "the newest tokens are not seen", seen(visible.tril(S - T - 1))
    by_tiles = q @ tiled.mT / math.sqrt(D)
    in_tiles = v.repeat(H // K, 1, 1)
    yield (
        "KV heads are tiled (query head h reads KV head h mod K), not repeated",
        seen(visible, by_tiles, in_tiles),
    )
    yield "every query head reads the first KV head", seen(visible, q @ first.mT / math.sqrt(D), v[:1])
    over_queries = scores.masked_fill(~visible, -math.inf).softmax(-2).nan_to_num()
    yield "softmax runs over the queries, not over the keys", over_queries @ values
    yield "softmax is left out", scores.masked_fill(~visible, 0) @ values
    yield "the mask comes after softmax: rows no longer sum to 1", scores.softmax(-1) * visible @ values
    yield "masked scores are 0, not -inf", scores.masked_fill(~visible, 0).softmax(-1) @ values


def swiglu(product: Suspects, down: Tensor) -> Suspects:
    """Of the MLP, from what can be wrong with the wide product."""
    for name, value in product:
        yield name, value @ down.T


def layer(
    x: Tensor,
    w: Weights,
    config: LlamaConfig,
    positions: Tensor,
    remember: ours.Remember = lambda k, v: (k, v),
    *,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    turned: str = "qk",
    projected: bool = True,
    parallel: bool = False,
    carried: bool = True,
    kept_before: bool = False,
) -> Tensor:
    """A layer with the mistakes that are asked for, (T, C).

    Args:
        x: (T, C).
        w: the layer's weights.
        config: the model's.
        positions: (T,).
        remember: as in the skeleton's `block`.
        norms: which weights the norms have; "" leaves one out.
        turned: which of q, k and v RoPE turns.
        projected: whether there is o_proj.
        parallel: whether the MLP reads the layer's input.
        carried: whether attention is added to the stream.
        kept_before: whether keys are remembered before RoPE.
    """

    def norm(name: str, x: Tensor) -> Tensor:
        return ours.rms_norm(x, w[f"{name}.weight"], config.rms_norm_eps) if name else x

    speeds = next(frequencies(config.head_dim, config.rope_theta))[1]
    h = norm(norms[0], x)
    q, k, v = (
        (h @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        for name in "qkv"
    )
    if kept_before:
        k, v = remember(k, v)
        k = torch.cat((k[:, : -len(positions)], ours.rope(k[:, -len(positions) :], positions, speeds)), dim=1)
        q = ours.rope(q, positions, speeds)
    else:
        turns = dict(zip("qkv", (q, k, v), strict=True))
        turns |= {name: ours.rope(turns[name], positions, speeds) for name in turned}
        q, (k, v) = turns["q"], remember(turns["k"], turns["v"])
    z = ours.attention(q, k, v).transpose(0, 1).flatten(1)
    attended = z @ w["self_attn.o_proj.weight"].T if projected else z
    if carried:
        attended = x + attended
    h = norm(norms[1], x if parallel else attended)
    return attended + ours.swiglu(h, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def block(
    x: Tensor, w: Weights, config: LlamaConfig, positions: Tensor, past: tuple[Tensor, Tensor]
) -> Suspects:
    """Of a layer whose `remember` puts `past` in front."""

    def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)

    def run(positions: Tensor = positions, remember: ours.Remember = remember, **wrong: object) -> Tensor:
        return layer(x, w, config, positions, remember, **wrong)  # type: ignore[arg-type]

    first, second = "input_layernorm", "post_attention_layernorm"
    yield "", run()
    yield "the norm before attention is left out", run(norms=("", second))
    yield "the norm before the MLP is left out", run(norms=(first, ""))
    yield "the two norms are swapped", run(norms=(second, first))
    yield "the MLP reads the layer's input, not the stream after attention", run(parallel=True)
    yield "attention's output replaces the stream: it is not added", run(carried=False)
    yield "RoPE is not applied", run(turned="")
    yield "RoPE turns the queries alone", run(turned="q")
    yield "RoPE turns the values, too", run(turned="qkv")
    yield "o_proj is left out", run(projected=False)
    yield "what `remember` gives is not used", run(remember=lambda k, v: (k, v))
    yield "positions are not used: they begin at 0", run(torch.arange(len(x)))


def sub(weights: Weights, prefix: str) -> Weights:
    """The weights below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def whole(
    ids: Tensor,
    weights: Weights,
    config: LlamaConfig,
    run: Callable[[int, Tensor], Tensor] | None = None,
    order: Sequence[int] | None = None,
    scale: float = 1.0,
    head: str = "lm_head.weight",
    normed: bool = True,
) -> Tensor:
    """The logits, (T, V), with the mistakes that are asked for.

    Args:
        ids: (T,).
        weights: all of them.
        config: the model's.
        run: computes a layer from its number and input; None: `layer` at positions from 0.
        order: which layers, in which order; None: all.
        scale: of the embeddings.
        head: the matrix at the end.
        normed: whether there is the final norm.
    """
    positions = torch.arange(len(ids))
    run = run or (lambda n, x: layer(x, sub(weights, f"layers.{n}."), config, positions))
    x = weights["embed_tokens.weight"][ids] * scale
    for n in range(config.num_hidden_layers) if order is None else order:
        x = run(n, x)
    if normed:
        x = ours.rms_norm(x, weights["norm.weight"], config.rms_norm_eps)
    return x @ weights[head].T


def llama(ids: Tensor, weights: Weights, config: LlamaConfig) -> Suspects:
    """Of the whole model."""
    last = config.num_hidden_layers - 1
    right = whole(ids, weights, config)
    yield "", right
    yield "the final norm is left out", whole(ids, weights, config, normed=False)
    yield "the last layer is left out", whole(ids, weights, config, order=range(last))
    yield "the first layer is left out", whole(ids, weights, config, order=range(1, last + 1))
    yield "the layers run backwards", whole(ids, weights, config, order=range(last, -1, -1))
    yield "every layer has the weights of the first", whole(ids, weights, config, order=[0] * (last + 1))
    yield (
        "embeddings are scaled by sqrt(hidden_size)",
        whole(ids, weights, config, scale=config.hidden_size**0.5),
    )
    yield (
        "the embedding's table is used for the head",
        whole(ids, weights, config, head="embed_tokens.weight"),
    )
    yield "softmax is applied: logits are asked for", right.softmax(-1)
    yield "log-softmax is applied: logits are asked for", right.log_softmax(-1)


def decode(calls: Sequence[Tensor], weights: Weights, config: LlamaConfig) -> Suspects:
    """Of a text in several calls, (T, V) in all."""

    def run(kept: str = "all", start: int | None = None, behind: int = 0) -> Tensor:
        pasts: dict[int, tuple[Tensor, Tensor]] = {}
        logits, done = [], 0
        for ids in calls:
            positions = torch.arange(len(ids)) + max(0, (done if start is None else start) - behind)

            def one(n: int, x: Tensor, positions: Tensor = positions, first: bool = done == 0) -> Tensor:
                def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                    at = 0 if kept == "shared" else n
                    past = pasts.get(at, (k[:, :0], v[:, :0]))
                    both = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
                    if first or kept != "prompt":
                        pasts[at] = (k, v) if kept == "last" else both
                    return past if kept == "late" and not first else (k, v) if kept == "last" else both

                w = sub(weights, f"layers.{n}.")
                return layer(x, w, config, positions, remember, kept_before=kept == "unturned")

            logits.append(whole(ids, weights, config, one))
            done += len(ids)
        return torch.cat(logits)

    yield "", run()
    yield "positions begin at 0 in each call", run(start=0)
    yield "positions are one behind after the first call", run(behind=1)
    yield "the cached keys and values are not read, or were overwritten", run("last")
    yield "all layers share one cache", run("shared")
    yield "keys are cached before RoPE, and old ones are never turned", run("unturned")
    yield "a new token does not see itself: it is cached after attention", run("late")
    yield "only the prompt is cached: what follows is forgotten", run("prompt")


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Suspects:
    """Of sampling: what an id is drawn from, (V,)."""
    V = len(logits)

    def limited(x: Tensor, k: int = top_k) -> Tensor:
        return x if k == 0 else x.masked_fill(x < x.topk(min(k, V)).values[-1], -math.inf)

    def nucleus(x: Tensor, p: float = top_p, crossing: bool = True, ascending: bool = False) -> Tensor:
        if p == 1:
            return x
        sizes, order = x.softmax(-1).sort(descending=not ascending)
        sums = sizes.cumsum(-1)
        out = (sums - sizes if crossing else sums) >= p
        out[0] = False
        return x.masked_fill(torch.zeros(V, dtype=torch.bool).scatter(0, order, out), -math.inf)

    if temperature == 0:
        top = F.one_hot(logits.argmax(), V).double()
        yield "", top
        yield "temperature 0 is not greedy", logits.softmax(-1)
        yield "temperature 0 is not greedy", torch.ones(V).double() / V
        return
    scaled = logits / temperature
    yield "", nucleus(limited(scaled)).softmax(-1)
    yield "the temperature multiplies the logits", nucleus(limited(logits * temperature)).softmax(-1)
    yield "the temperature is ignored", nucleus(limited(logits)).softmax(-1)
    yield "top-p comes before the temperature", (nucleus(limited(logits)) / temperature).softmax(-1)
    yield "top-p leaves out the token that reaches p", nucleus(limited(scaled), crossing=False).softmax(-1)
    yield "top-p keeps the least likely tokens", nucleus(limited(scaled), ascending=True).softmax(-1)
    yield "top-p is ignored", limited(scaled).softmax(-1)
    yield "top-k is ignored", nucleus(scaled).softmax(-1)
    yield "top-k keeps one token more", nucleus(limited(scaled, top_k and top_k + 1)).softmax(-1)
    yield "top-k keeps one token less", nucleus(limited(scaled, top_k and max(top_k - 1, 1))).softmax(-1)
    out = nucleus(limited(scaled))
    yield "what is out has logit 0, not -inf", out.masked_fill(out == -math.inf, 0).softmax(-1)
    yield "softmax is applied twice", out.softmax(-1).softmax(-1)
    yield "the most likely token always wins", F.one_hot(logits.argmax(), V).double()
