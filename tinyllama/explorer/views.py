"""What the page shows of a recording: every function gives plain JSON, computed from what was recorded."""

from __future__ import annotations

import ast
import base64
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.explorer.lines import Call, Trace, function_source
from tinyllama.explorer.recording import COLUMNS, HeadRows, Pass, Recording, together
from tinyllama.kernels import kernel_name
from tinyllama.sampler import Sampler, repetition_penalty, top_k, top_p
from tinyllama.text.pieces import characters, spelt
from tinyllama.text.tokenizer import Tokenizer

WORDS = 5  # of a lens
CANDIDATES = 12  # of a choice
LARGEST = 1 << 17  # numbers that are sent of one value; of more, the selected token's alone
MASKED = -1e30  # a score this low is that of a masked key
SCORES = ("entropy", "distance", "sink", "previous", "induction")


def tokens(recording: Recording, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Every token: id, piece, bytes, what the model expected next, and how much the token surprised it."""
    found: list[dict[str, Any]] = []
    for one in recording.passes:
        for index, id in enumerate(one.ids):
            best, log_p = (part[index].tolist() for part in one.top)
            found.append(
                {
                    "id": id,
                    "piece": spelt(tokenizer, id)[0],
                    "bytes": spelt(tokenizer, id)[1].hex(" "),
                    "next": [
                        [word, text(tokenizer, word), math.exp(p)]
                        for word, p in zip(best, log_p, strict=True)
                    ],
                }
            )
    # Known after the token itself has been read.
    surprises = [math.nan, *(value for one in recording.passes for value in one.surprise.tolist())][:-1]
    for token, surprise, shown in zip(found, surprises, characters(recording.ids, tokenizer), strict=True):
        token["surprise"] = None if math.isnan(surprise) else surprise
        token["text"], token["joined"] = shown
    return found


@cache
def text(tokenizer: Tokenizer, id: int) -> str:
    """One token alone, as text; bytes that are no character as their piece."""
    piece, raw = spelt(tokenizer, id)
    shown = raw.decode("utf-8", "replace") or piece
    return piece if "\ufffd" in shown else shown


def heads(recording: Recording) -> dict[str, Any]:
    """The scores of every head, [layer][head], and its map in small: rows by columns, 8 bits each."""
    layers = len(recording.kernels)
    rows = [[one.heads[layer] for one in recording.passes] for layer in range(layers)]
    columns = -(-len(recording.ids) // recording.width)
    return {
        "scores": {name: [_scores(parts, name) for parts in rows] for name in SCORES},
        "maps": [_small_maps(parts, columns) for parts in rows],
        "columns": columns,
    }


def _scores(parts: list[HeadRows | None], name: str) -> list[float] | None:
    """The mean of a score over the queries, by head; the first query has no choice and is left out."""
    if any(part is None for part in parts):
        return None
    values = torch.cat([getattr(part, name) for part in parts], dim=1)
    return (values[:, 1:] if values.shape[1] > 1 else values).mean(dim=1).tolist()


def _small_maps(parts: list[HeadRows | None], columns: int) -> dict[str, Any] | None:
    if any(part is None for part in parts):
        return None
    rows = torch.cat([part.columns[..., :columns] for part in parts if part is not None], dim=1)
    step = -(-rows.shape[1] // COLUMNS)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % step))
    pooled = padded.unflatten(1, (-1, step)).amax(2)
    return {"rows": pooled.shape[1], "data": _bytes((pooled * 255).round().to(torch.uint8))}


def attention_map(recording: Recording, layer: int, head: int) -> dict[str, Any] | None:
    """A head's pattern over the whole text, 8 bits a pair; None where its kernel shows none."""
    T = len(recording.ids)
    whole = torch.zeros(T, T, dtype=torch.uint8)
    for one in recording.passes:
        pattern = one.pattern(layer)
        if pattern is None:
            return None
        rows = (pattern[head].float() * 255).round().to(torch.uint8)
        whole[one.start : one.end, : rows.shape[1]] = rows
    return {"tokens": T, "data": _bytes(whole)}


def attention_row(recording: Recording, layer: int, head: int, token: int) -> list[float] | None:
    """How much of its attention a query gives to each token up to itself."""
    one, index = recording.at(token)
    pattern = one.pattern(layer)
    return None if pattern is None else pattern[head, index].float().tolist()


# --- the code --------------------------------------------------------------------------------------------


def code(one: Pass, layer: int, traced: Trace) -> dict[str, Any]:
    """The statements of a pass in their order, with what each bound; those of one layer are in their place.

    Args:
        one: the pass.
        layer: which layer's statements are among them.
        traced: that layer's.
    """
    enters = one.code.left_out  # the layers
    cut = enters[layer] + 1
    order = [("top", one.code, index) for index in range(cut)]
    order += [("layer", traced, index) for index in range(len(traced.steps))]
    order += [("top", one.code, index) for index in range(cut, len(one.code.steps))]
    calls: dict[tuple[str, int], dict[str, Any]] = {}
    places: dict[tuple[str, int | None], int] = {("layer", None): cut - 1}
    steps: list[dict[str, Any]] = []
    for part, trace, index in order:
        step, call = trace.steps[index], trace.calls[trace.steps[index].call]
        places[part, index] = len(steps)
        if (part, step.call) not in calls:
            caller = places.get((part, call.caller))
            calls[part, step.call] = {"index": len(calls), "caller": caller, **_described(call)}
        letters = _letters(call, step.line)
        values = [
            {
                "name": name,
                "key": f"{part}/{index}/{name}",  # by which its numbers can be had
                "shape": list(value.shape),
                "axes": _axes(value, letters.get(name, letters.get("")), one),
            }
            for name, value in step.values.items()
        ]
        steps.append({"call": calls[part, step.call]["index"], "line": step.line, "values": values})
    # Where each layer is entered: here, and in this view of the layer itself, whose steps come after it.
    shown = [places["top", index] for index in enters]
    return {"calls": list(calls.values()), "steps": steps, "enters": shown, "entered": enters}


def code_value(one: Pass, traced: Trace, key: str, index: int) -> dict[str, Any]:
    """A value of `code`: its figures and numbers, of a large one those of the token at `index` alone."""
    part, step, name = key.split("/", 2)
    trace = one.code if part == "top" else traced
    value = trace.steps[int(step)].values[name]
    call = trace.calls[trace.steps[int(step)].call]
    letters = _letters(call, trace.steps[int(step)].line)
    named = _axes(value, letters.get(name, letters.get("")), one)
    figures = _figures(value)
    if value.numel() > LARGEST and "T" in named:
        value = value.narrow(named.index("T"), index, 1)
    return {"shape": list(value.shape), "axes": named, **figures, **_numbers(value)}


def _described(call: Call) -> dict[str, Any]:
    first, lines = call.source
    path = Path(call.file)
    ours = path.parent == Path(__file__).parents[1]
    return {
        "name": call.name,
        "file": f"tinyllama/{path.name}" if ours else path.name,
        "first": first,
        "lines": lines,
    }


@cache
def _comments(call_code: Any) -> dict[int, str]:
    """The last shape in the comment of each line: `# (B, H, T, D)`."""
    first, lines = function_source(call_code)
    found = {}
    for number, line in enumerate(lines, first):
        shapes = re.findall(r"\(([A-Z0-9][^()]*)\)", line.partition("#")[2])
        if shapes:
            found[number] = shapes[-1]
    return found


def _letters(call: Call, line: int) -> dict[str, str]:
    """The axes that the comment of a line names, for the names that it binds; "" for all."""
    comment = _comments(call.code).get(line)
    first, lines = call.source
    if comment is None or not lines:
        return {}
    try:
        tree = ast.parse(lines[line - first].strip())
    except SyntaxError:
        return {}
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    targets = [node.id for node in names if isinstance(node.ctx, ast.Store)]
    return dict.fromkeys(targets or ["return"], comment)


def _axes(value: Tensor, comment: str | None, one: Pass) -> list[str]:
    """A letter for each axis: from the comment in the code, or else from the lengths."""
    if comment is not None:
        named = [part.strip() for part in comment.split(",")]
        if len(named) == value.dim():
            return named
    config, T = one.recording.model.config, len(one.ids)
    sizes = {
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "D": config.head_dim,
        "C": config.hidden_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
    }
    heads_wide = {sizes["H"] * sizes["D"]: "H*D", sizes["K"] * sizes["D"]: "K*D"}
    found: list[str] = []
    for axis, length in enumerate(value.shape):
        last = axis == value.dim() - 1
        if axis == 0 and length == 1 and value.dim() > 1:
            letter = "B"
        elif "T" not in found and length == T and not (last and value.dim() > 3):
            letter = "T"
        elif length == one.end and length not in (sizes["D"], sizes["C"]):
            letter = "S"
        else:
            order = "DCFV" if last else "HK"
            matches = [letter for letter in order if sizes[letter] == length]
            letter = matches[0] if matches else heads_wide.get(length, str(length))
        found.append(letter)
    return found


def _figures(value: Tensor) -> dict[str, float]:
    """The size of all numbers of a value."""
    numbers = value if value.is_floating_point() else value.float()
    if not numbers.numel():
        numbers = torch.zeros(1)
    least, most = numbers.aminmax()
    return {
        "mean": numbers.mean(dtype=torch.float64).item(),
        "rms": torch.linalg.vector_norm(numbers, dtype=torch.float64).item() / math.sqrt(numbers.numel()),
        "min": least.item(),
        "max": most.item(),
    }


# --- the residual stream ---------------------------------------------------------------------------------


@torch.no_grad()
def lens(recording: Recording, tokenizer: Tokenizer, token: int) -> list[dict[str, Any]]:
    """What the stream would predict after the embedding, each attention and MLP (nostalgebraist 2020)."""
    one, index = recording.at(token)
    model = recording.model
    stages = [("embedding", one.streams[0])]
    for layer, (middle, after) in enumerate(zip(one.middles, one.streams[1:], strict=True)):
        stages += [(f"{layer} attention", middle), (f"{layer} mlp", after)]
    stream = torch.stack([value[0, index] for _, value in stages])  # (2L + 1, C)
    p = model.lm_head(model.norm(stream)).float().softmax(-1)
    top = p.topk(WORDS)
    following = recording.ids[token + 1] if token + 1 < len(recording.ids) else int(one.top[0][index, 0])
    return [
        {
            "stage": name,
            "norm": stream[row].float().norm().item(),
            "words": [
                [id, text(tokenizer, id), value]
                for id, value in zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)
            ],
            "following": p[row, following].item(),
        }
        for row, (name, _) in enumerate(stages)
    ]


@torch.no_grad()
def attribution(recording: Recording, token: int, target: int) -> dict[str, Any]:
    """What every head and MLP adds to the logit of a next token; the rest is rounding.

    The final norm divides the whole stream by one number, so that the logit is a sum (Elhage et al. 2021).
    """
    one, index = recording.at(token)
    model = recording.model
    config, norm = model.config, model.norm
    stream = one.streams[-1][0, index].double()
    scale = torch.rsqrt(stream.square().mean() + norm.eps)
    direction = model.lm_head.weight[target].double() * norm.weight.double() * scale  # (C)
    by_head = []
    for attention, z in zip(model.attentions, one.z, strict=True):
        weight = attention.o_proj.weight.double().view(-1, config.num_attention_heads, config.head_dim)
        by_head.append((torch.einsum("chd,c->hd", weight, direction) * z[0, :, index].double()).sum(-1))
    heads, embedding = torch.stack(by_head), one.streams[0][0, index].double() @ direction
    mlps = torch.stack([mlp[0, index].double() @ direction for mlp in one.mlps])
    logit = model.lm_head(norm(one.streams[-1][0, index]))[target].item()
    return {
        "embedding": embedding.item(),
        "heads": heads.tolist(),
        "mlps": mlps.tolist(),
        "logit": logit,
        "rest": logit - (embedding + heads.sum() + mlps.sum()).item(),
    }


@torch.no_grad()
def neurons(recording: Recording, tokenizer: Tokenizer, layer: int, token: int, traced: Trace) -> list[Any]:
    """The neurons of an MLP that add most to the stream, and the words that they push."""
    index = recording.at(token)[1]
    model = recording.model
    down = model.get_parameter(f"layers.{layer}.mlp.down_proj.weight")
    products = [step.values["product"] for step in traced.steps if "product" in step.values]
    if not products:
        return []
    values = products[-1][0, index].to(down.dtype)
    order = (values.abs() * down.norm(dim=0)).topk(min(10, values.numel())).indices
    pushes = model.lm_head((down[:, order] * values[order]).T * model.norm.weight)  # (10, V)
    top = pushes.topk(WORDS).indices.tolist()
    return [
        {"neuron": n, "value": values[n].item(), "words": [text(tokenizer, id) for id in words]}
        for n, words in zip(order.tolist(), top, strict=True)
    ]


# --- positions -------------------------------------------------------------------------------------------


def rope(recording: Recording, layer: int, head: int, query: int, key: int, traced: Trace) -> dict[str, Any]:
    """The pairs of dimensions of a query and a key before and after RoPE, and what each adds to the score."""
    index = recording.at(query)[1]
    config = recording.model.config
    served = head * config.num_key_value_heads // config.num_attention_heads
    q = _last(traced, "q_rot")[0, head, index].double()
    k = recording.cache.keys[layer, 0, served, 1 + key].double()
    frequencies = recording.model.rotary.frequencies(torch.float64, q.device)
    (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
    scale = config.head_dim**-0.5
    # The angle between the two turns by the frequency with every step of distance.
    angle = torch.atan2(q2, q1) - torch.atan2(k2, k1)
    size = torch.hypot(q1, q2) * torch.hypot(k1, k2) * scale
    distances = torch.arange(0, max(len(recording.ids), 2))
    turned = angle[:, None] + (distances[None] - (query - key)) * frequencies[:, None]
    return {
        "frequencies": frequencies.tolist(),
        "query": torch.stack([q1, q2], -1).tolist(),
        "key": torch.stack([k1, k2], -1).tolist(),
        "adds": ((q1 * k1 + q2 * k2) * scale).tolist(),
        "score": ((q1 * k1 + q2 * k2) * scale).sum().item(),
        "by_distance": (size[:, None] * turned.cos()).sum(0).tolist(),
    }


def _last(trace: Trace, name: str) -> Tensor:
    return next(step.values[name] for step in reversed(trace.steps) if name in step.values)


# --- choosing --------------------------------------------------------------------------------------------


@torch.no_grad()
def choice(recording: Recording, tokenizer: Tokenizer, token: int, sampler: Sampler) -> dict[str, Any]:
    """How the token after a position is chosen: its candidates through penalty, temperature, top-k and top-p.

    A draw is a race, as in `torch.multinomial`: each candidate waits for a random time, exponential with mean
    1/p, and the first to arrive is chosen. The times are those that the seed gives in `tinyllama.generate`.

    Args:
        recording: the text.
        tokenizer: for the words.
        token: the position whose logits choose.
        sampler: the settings.
    """
    logits = _logits(recording, token)[None].float()  # (1, V)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, recording.ids[: token + 1]] = True
    penalised = repetition_penalty(logits, seen, sampler.repetition_penalty)
    scaled = penalised if sampler.greedy else penalised / sampler.temperature
    by_k = top_k(scaled, sampler.top_k)
    p = sampler.probabilities(logits, seen)
    generator = sampler.generator(logits.device)
    for _ in range(max(token - recording.prompt + 1, 0)):  # the draws of the tokens before
        torch.empty_like(p).exponential_(generator=generator)
    arrival = torch.empty_like(p).exponential_(generator=generator) / p
    drawn = int(penalised.argmax() if sampler.greedy else arrival.argmin())
    best = p[0].topk(CANDIDATES).indices
    best = best[p[0, best] > 0]
    order = torch.cat([logits[0].topk(CANDIDATES).indices, best, torch.tensor([drawn])]).unique()
    order = order[logits[0, order].sort(descending=True).indices]
    order = order[p[0, order].sort(descending=True, stable=True).indices]
    stages = {
        "logit": logits,
        "penalised": penalised,
        "scaled": scaled,
        "top_k": by_k,
        "top_p": top_p(by_k, sampler.top_p),
        "p": p,
        "arrival": arrival,
    }
    return {
        "candidates": [
            {"id": id, "text": text(tokenizer, id)}
            | {name: _finite(value[0, id].item()) for name, value in stages.items()}
            for id in order.tolist()
        ],
        "kept": int((p > 0).sum()),
        "drawn": drawn,
        "greedy": sampler.greedy,
    }


def _logits(recording: Recording, token: int) -> Tensor:
    """The logits after a position, (V,)."""
    one, index = recording.at(token)
    return recording.model.lm_head(recording.model.norm(one.streams[-1][:, index]))[0]


@torch.no_grad()
def compare(first: Recording, second: Recording, tokenizer: Tokenizer) -> dict[str, Any]:
    """Two branches: where their texts part, what comes next in each, and how the stream differs by layer."""
    pairs = list(zip(first.ids, second.ids, strict=False))
    common = next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))
    start = max(common - 64, 0)
    kls = []
    for token in range(start, common):
        p, q = (_logits(one, token).double().log_softmax(-1) for one in (first, second))
        kls.append((p.exp() * (p - q)).sum().item())
    ends = [_logits(one, len(one.ids) - 1).float().softmax(-1) for one in (first, second)]
    order = torch.cat([p.topk(WORDS).indices for p in ends]).unique()
    order = order[ends[0][order].sort(descending=True).indices]
    (one, index), (other, at) = first.at(common - 1), second.at(common - 1)
    streams = [
        (a[0, index].double(), b[0, at].double()) for a, b in zip(one.streams, other.streams, strict=True)
    ]
    return {
        "common": common,
        "start": start,
        "kl": kls,
        "next": [[id, text(tokenizer, id), *(p[id].item() for p in ends)] for id in order.tolist()],
        "stream": [((a - b).norm() / a.norm()).item() for a, b in streams],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cache_slots(recording: Recording, token: int) -> dict[str, Any]:
    """What a pass reads from the cache and writes into it, in slots and bytes."""
    one, _ = recording.at(token)
    keys = recording.cache.keys
    slot = 2 * keys.shape[0] * keys.shape[2] * keys.shape[4] * keys.element_size()
    return {
        "slots": recording.cache.capacity,
        "written": [one.start, one.end],
        "read": one.end,
        "bytes_per_slot": slot,
        "bytes_read": slot * one.end,
        "bytes_written": slot * len(one.ids),
    }


def batch(recording: Recording, tokenizer: Tokenizer, other: list[int]) -> dict[str, Any]:
    """A text beside another in one batch: the columns' positions, the slots, what the last query reads."""
    both = together(recording, other)
    p = both.logits.float().softmax(-1)
    rows = []
    for row, ids in enumerate((recording.ids, other)):
        best = int(p[row].argmax())
        rows.append(
            {
                "tokens": [shown for shown, _joined in characters(ids, tokenizer)],
                "positions": both.positions[row].tolist(),
                "visible": both.visible[row].tolist(),
                "written": both.written[row].tolist(),
                "next": [best, text(tokenizer, best), p[row, best].item()],
            }
        )
    alone = recording.passes[-1].logits
    return {"rows": rows, "apart": (both.logits[0] - alone).abs().max().item()}


def facts(recording: Recording, name: str) -> dict[str, Any]:
    """The model's name and sizes, and the kernel of each layer."""
    config = recording.model.config
    return {
        "model": name,
        "L": config.num_hidden_layers,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "D": config.head_dim,
        "C": config.hidden_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "context": config.context,
        "parameters": recording.model.num_parameters(),
        "kernels": [kernel_name(kernel) for kernel in recording.kernels],
        "passes": [[one.start, one.end] for one in recording.passes],
    }


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.cpu().contiguous().numpy().tobytes()).decode()


def _numbers(value: Tensor) -> dict[str, Any]:
    """Numbers as float16 with a common factor, in base64: three digits, in a fifth of JSON's bytes."""
    values = value.float()
    values = values.masked_fill(values <= MASKED, -torch.inf)
    finite = values[values.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    factor = 2.0 ** math.ceil(math.log2(largest / 60000)) if largest > 60000 else 1.0
    return {"factor": factor, "data": _bytes((values / factor).half().view(torch.int16))}
