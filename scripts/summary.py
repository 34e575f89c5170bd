"""What a model is made of, from its config.json alone: modules, parameters, bytes, FLOPs.

The model is built on PyTorch's meta device, where tensors have shapes and no
memory, so no weights are needed. FLOPs count 2 per multiply-add of the matrix
products; for a token that attends to S keys (its own included) they are

  2 L (attention (2H + 2K) D C + MLP 3 F C) + 2 V C    the weights, each used once
  + 4 L H D S                                          queries by keys, pattern by values

with L layers, H heads, K KV heads, head size D, hidden size C, MLP size F and
vocabulary V. Norms, RoPE, softmax and SiLU are left out: well under 1 %.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyllama.cli import options, terminal
from tinyllama.errors import InputError
from tinyllama.progress import TableConsole, escape

if TYPE_CHECKING:
    from rich.table import Table

    from tinyllama import Llama, LlamaConfig

EXAMPLES = """\
  python scripts/summary.py                               TinyLlama-1.1B
  python scripts/summary.py smollm2
  python scripts/summary.py weights/SmolLM2-135M-Instruct/config.json
  python scripts/summary.py meta-llama/Llama-3.2-1B       fetches its config.json, no weights
  python scripts/summary.py --ranks 8                     who has what of 8 processes
  python scripts/summary.py --json | python -m json.tool"""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# A config may claim any number of layers, and every one is built.
MOST_LAYERS = 10_000


class Summary(NamedTuple):
    """What the tables show, and --json prints under these names."""

    model: str
    config: LlamaConfig
    parameters: dict[str, int]  # by part, and their total
    weight_bytes: dict[str, int]  # by dtype
    kv_cache_bytes: dict[str, dict[str, int]]  # for this model, and as MHA and MQA would need
    flops_per_token: dict[int, int]  # by the number of keys that the token attends to
    ranks: dict[str, Any] | None  # what each process has under --ranks


def main() -> None:
    """Print the module tree and the tables, or under --json all figures."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "model",
        nargs="?",
        help="a name on the Hub, a folder, a config.json, or smollm2 (default: TinyLlama-1.1B-Chat)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--ranks", type=options.positive, metavar="N", help="what each of N processes has of the weights"
    )
    parser.add_argument(
        "--split",
        choices=["exact", "fast"],
        default="exact",
        help="how they share matrices; see docs/parallel.md (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline",
        type=options.positive,
        default=1,
        metavar="N",
        help="stages that share the layers (default: %(default)s)",
    )
    args = parser.parse_args()

    title, config = find_config(args.model)
    model = skeleton(config, title)
    summary = Summary(
        model=title,
        config=config,
        parameters=config.parameters | {"total": model.num_parameters()},
        weight_bytes={dtype: size * model.num_parameters() for dtype, size in BYTES.items()},
        kv_cache_bytes=kv_cache_bytes(config),
        flops_per_token={keys: flops(config, keys) for keys in context_points(config)},
        ranks=None if args.ranks is None else shared(model, args.ranks, args.split, args.pipeline),
    )
    if args.json:
        print(json.dumps(summary._asdict() | {"config": dataclasses.asdict(config)}, indent=2))
    else:
        show(summary, model)


def find_config(name: str | None) -> tuple[str, LlamaConfig]:
    """A title and the config. Of a model that is not on the disk, only config.json is downloaded."""
    from tinyllama import LlamaConfig
    from tinyllama.checkpoints import hub
    from tinyllama.checkpoints.config_file import config_from_dict, read_config
    from tinyllama.checkpoints.download import download_config
    from tinyllama.checkpoints.files import read_json

    if name in (None, hub.DEFAULT_MODEL):
        folder = hub.on_disk(hub.DEFAULT_MODEL)
        if folder is None:
            return "TinyLlama-1.1B (built-in config)", LlamaConfig()
    elif os.path.isfile(path := os.path.expanduser(name)):
        return name, config_from_dict(read_json(Path(path)), where=name)
    elif not os.path.isdir(path) and hub.is_repository(name) and not hub.on_disk(name):
        return name, config_from_dict(read_json(download_config(name)), where=name)
    else:
        folder = hub.resolve(name)
    return str(folder), read_config(folder)


def skeleton(config: LlamaConfig, title: str) -> Llama:
    """The model without memory for its weights."""
    import torch

    from tinyllama import Llama

    if config.num_hidden_layers > MOST_LAYERS:
        raise InputError(
            f"{title}: num_hidden_layers: expected at most {MOST_LAYERS}, got {config.num_hidden_layers}; "
            "correct the file"
        )
    with torch.device("meta"):
        return Llama(config)


def kv_cache_bytes(config: LlamaConfig) -> dict[str, dict[str, int]]:
    """Bytes of all layers' keys and values: for one token and for a full context, at three head counts."""
    K, H = config.num_key_value_heads, config.num_attention_heads
    return {
        name: {"kv_heads": heads}
        | {
            f"{dtype} {span}": 2 * config.num_hidden_layers * heads * config.head_dim * size * tokens
            for dtype, size in BYTES.items()
            for span, tokens in (("token", 1), ("context", config.context))
        }
        for name, heads in (("this model", K), ("MHA", H), ("MQA", 1))
    }


def context_points(config: LlamaConfig) -> list[int]:
    """Keys that the first token, the middle one and the last one of a full context attend to."""
    context = config.context
    return sorted({1, max(context // 2, 1), context})


def flops(config: LlamaConfig, keys: int) -> int:
    """FLOPs of one token that attends to `keys` keys; the formula is at the top."""
    parts = config.parameters
    head = config.vocab_size * config.hidden_size  # computed whether it is tied or not
    attending = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    return 2 * (parts["attention"] + parts["mlp"] + head + attending)


def shared(model: Llama, ranks: int, split: str, pipeline: int) -> dict[str, Any]:
    """Which part of each weight every rank has, their sizes, and what each receives for a token."""
    from tinyllama.parallel.plan import Plan

    plan = Plan.of(model.config, ranks, split, pipeline)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    numbers = [plan.parameters(shapes, rank) for rank in range(ranks)]
    cuts = {name: plan.cut(name) for name in shapes}
    return {
        "split": split,
        "layers": [
            [part.start, part.stop] for part in (plan.layers[plan.stage(rank)] for rank in range(ranks))
        ],
        "weights": {
            name: {"axis": cut.axis, "parts": [[part.start, part.stop] for part in cut.parts]}
            for name, cut in cuts.items()
        },
        "parameters": numbers,
        "weight_bytes": {dtype: [size * number for number in numbers] for dtype, size in BYTES.items()},
        "kv_heads": [[part.start, part.stop] for part in plan.kv_heads],
        "received_bytes_per_token": {
            dtype: [plan.received(size, rank) for rank in range(ranks)] for dtype, size in BYTES.items()
        },
    }


def rank_tables(figures: dict[str, Any]) -> list[Table]:
    """The plan, for a reader. Layers are alike, so one of a rank's stands for all; norms are whole."""
    axes: dict[str, int] = {}
    parts_of: dict[tuple[str, int], list[int]] = {}
    for name, cut in figures["weights"].items():
        kind = name.split(".")[-2]
        axes[kind] = cut["axis"]
        parts_of |= {(kind, rank): part for rank, part in enumerate(cut["parts"]) if part[0] < part[1]}
    kinds = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"]
    titles = ["q", "k, v", "o", "gate, up", "down", "embed, head"]
    heads = [
        f"{title} {'columns' if axes[kind] else 'rows'}" for kind, title in zip(kinds, titles, strict=True)
    ]
    parts = table(f"Rank, {figures['split']} split", *heads)
    sizes = table("Rank", "layers", "parameters", *(f"{dtype} bytes" for dtype in BYTES))
    for rank, number in enumerate(figures["parameters"]):
        ranges = (parts_of[kind, rank] for kind in kinds)
        parts.add_row(str(rank), *(f"{start}-{stop - 1}" for start, stop in ranges))
        nbytes = (numbers[rank] for numbers in figures["weight_bytes"].values())
        first, end = figures["layers"][rank]
        sizes.add_row(str(rank), f"{first}-{end - 1}", f"{number:,}", *(f"{size:,}" for size in nbytes))
    received = table("A rank receives", "bytes a token, at most")
    for dtype, numbers in figures["received_bytes_per_token"].items():
        received.add_row(dtype, f"{max(numbers):,}")
    return [parts, sizes, received]


def show(summary: Summary, model: Llama) -> None:
    """The module tree and the figures, for a reader."""
    console = TableConsole()
    print(f"{escape(summary.model)}\n\n{model}\n")

    fields = table("Config", "value")
    for name, value in dataclasses.asdict(summary.config).items():
        fields.add_row(name, str(value))

    parts = summary.parameters
    parameters = table("Parameters", "number", "share")
    for part, number in parts.items():
        parameters.add_row(part, f"{number:,}", f"{number / parts['total']:.1%}")

    weights = table("Weights", "bytes")
    for dtype, size in summary.weight_bytes.items():
        weights.add_row(dtype, f"{size:,}")

    cache = table("KV cache, bytes", "KV heads", "float32 token", "context", "bfloat16 token", "context")
    spans = ("float32 token", "float32 context", "bfloat16 token", "bfloat16 context")
    for name, numbers in summary.kv_cache_bytes.items():
        cache.add_row(name, str(numbers["kv_heads"]), *(f"{numbers[span]:,}" for span in spans))

    work = table("FLOPs a token", "number")
    for keys, number in summary.flops_per_token.items():
        work.add_row(f"{keys - 1:,} tokens before it", f"{number:,}")

    ranks = [] if summary.ranks is None else rank_tables(summary.ranks)
    for each in (fields, parameters, weights, cache, work, *ranks):
        console.print(each)
        console.print()


def table(title: str, *columns: str) -> Table:
    """An empty table of numbers."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    made.add_column(title)
    for column in columns:
        made.add_column(column, justify="right")
    return made


if __name__ == "__main__":
    terminal.run(main)
