"""Greedy and sampled decoding of one prompt, each twice; and what recording gradients costs.

Greedy decoding takes the most likely token each time, so it gives one text.
Sampling draws each token from the model's distribution: another text every time,
and the same one again with the same seed.

The second table is one forward pass over the prompt and the greedy text: the
median time of several passes, the modes taking turns, and the bytes of activations
that autograd keeps for a backward pass. Those are counted, tensor by tensor
(torch.autograd.graph.saved_tensors_hooks): each storage once, without the weights,
which are there in any mode. Unlike the peak memory of the process, that count has no
allocator or library in it, and is the same in every run and on every machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tinyllama
from tinyllama.cli import options, terminal
from tinyllama.progress import escape

if TYPE_CHECKING:
    from tinyllama import Llama

EXAMPLES = """\
  python scripts/decoding.py
  python scripts/decoding.py --model smollm2 --prompt "The best thing about Paris is"
  python scripts/decoding.py --temperature 1.5 --top-k 0 --top-p 1 --seed 7
  python scripts/decoding.py --json | python -m json.tool"""

PASSES = 5

VERDICTS = {
    ("greedy", True): "identical, as they must be: nothing is left to chance",
    ("greedy", False): "DIFFERENT: greedy decoding must repeat itself, something is wrong",
    ("no seed", True): "identical, by chance: raise --temperature or --max-new-tokens",
    ("no seed", False): "different, as expected: each has its own random numbers",
    ("seed", True): "identical, as they must be: the same random numbers",
    ("seed", False): "DIFFERENT: a seed must repeat itself, something is wrong",
}


def main() -> int:
    """Print both tables; exit with 1 if decoding that must repeat itself does not."""
    args = parse()
    settings = options.sampling(args)
    if tinyllama.Sampler(settings["temperature"]).greedy:
        raise tinyllama.InputError(
            "temperature: expected above 0, to compare with greedy; got 0 or nearly so"
        )
    model, tokenizer = options.load(args)
    ids = tokenizer.encode(args.prompt)

    ways = {
        "greedy": settings | {"temperature": 0.0},
        "no seed": settings | {"seed": None},
        "seed": settings,
    }
    runs = {
        name: [tinyllama.generate(model, [ids], **way)[0] for _ in range(2)] for name, way in ways.items()
    }
    text = ids + runs["greedy"][0]
    results: dict[str, Any] = {
        "prompt": args.prompt,
        "settings": settings,
        "decoding": {
            name: {
                "texts": [tokenizer.decode(new_ids, skip_special=True) for new_ids in pair],
                "identical": pair[0] == pair[1],
            }
            for name, pair in runs.items()
        },
        "pass_tokens": len(text),
        "passes": compare_modes(model, text),
    }
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        show(results)
    return 0 if results["decoding"]["greedy"]["identical"] and results["decoding"]["seed"]["identical"] else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options.add_sampling_options(parser)
    options.add_model_options(parser)
    # The notebook's settings; its top_k was transformers' default.
    parser.set_defaults(max_new_tokens=24, temperature=0.7, top_k=50, top_p=0.9, seed=42)
    return parser.parse_args()


def compare_modes(model: Llama, ids: list[int]) -> dict[str, dict[str, float]]:
    """Bytes saved for a backward pass, and the median seconds of a forward pass, in each gradient mode."""
    import torch

    modes = {
        "torch.enable_grad()": torch.enable_grad,
        "torch.no_grad()": torch.no_grad,
        "torch.inference_mode()": torch.inference_mode,
    }
    batch = torch.tensor([ids], device=model.lm_head.weight.device)
    saved = {name: saved_bytes(model, batch, mode) for name, mode in modes.items()}  # a warm-up too
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(PASSES):
        for name, mode in modes.items():
            seconds[name].append(pass_seconds(model, batch, mode))
    return {
        name: {"saved_bytes": saved[name], "median_seconds": statistics.median(seconds[name])}
        for name in modes
    }


def saved_bytes(model: Llama, ids: Any, mode: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, beside the weights."""
    from torch.autograd.graph import saved_tensors_hooks

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would tie its graph to itself, never to be freed

    with saved_tensors_hooks(count, lambda tensor: tensor), mode():
        logits = model(ids)
    del logits  # until here they hold the graph, so that no address is used twice
    return sum(saved.values())


def pass_seconds(model: Llama, ids: Any, mode: Callable[[], Any]) -> float:
    """How long a forward pass takes."""
    import torch

    start = time.perf_counter()
    with mode():
        model(ids)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def show(results: dict[str, Any]) -> None:
    """Both tables and the verdicts, for a reader."""
    from rich.box import HORIZONTALS
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    settings = results["settings"]
    left_out = {"seed"} if settings["speculate"] else {"seed", "speculate"}
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in left_out)
    titles = {"greedy": "greedy", "no seed": "sampled, no seed", "seed": f"sampled, seed {settings['seed']}"}
    texts = Table(box=HORIZONTALS, show_lines=True)
    texts.add_column("", no_wrap=True)
    texts.add_column("first run", ratio=1)
    texts.add_column("second run", ratio=1)
    for name, way in results["decoding"].items():
        shown = [Text(escape(text, keep="\n")) for text in way["texts"]]
        texts.add_row(titles[name], *shown)
    console.print(Text(f"prompt: {escape(results['prompt'])}"))
    console.print(f"sampled: {chosen}")
    console.print(texts)
    for name, way in results["decoding"].items():
        console.print(f"{titles[name]}: {VERDICTS[name, way['identical']]}")

    costs = Table(box=HORIZONTALS)
    costs.add_column(f"one forward pass of {results['pass_tokens']} tokens")
    costs.add_column("kept for a backward pass", justify="right")
    costs.add_column("median time", justify="right")
    for name, cost in results["passes"].items():
        costs.add_row(name, f"{cost['saved_bytes']:,} bytes", f"{cost['median_seconds'] * 1000:.0f} ms")
    console.print()
    console.print(costs)


if __name__ == "__main__":
    terminal.run(main)
