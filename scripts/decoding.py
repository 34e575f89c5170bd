"""Greedy and sampled decoding of one prompt, each twice; and what recording gradients costs.

Greedy decoding takes the most likely token each time, so it gives one text.
Sampling draws each token from the model's distribution: another text every time,
and the same one again with the same seed.

The second table is one forward pass over the prompt and the greedy text, in each
gradient mode: the median time of several passes, and the bytes of activations that
autograd keeps for a backward pass. The bytes are summed over the saved tensors
(torch.autograd.graph.saved_tensors_hooks), without the weights, so unlike a process's
peak memory the sum is the same in every run and on every machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import tinyllama
from tinyllama.cli import options, terminal
from tinyllama.progress import TableConsole, escape

if TYPE_CHECKING:
    from tinyllama.bench.decoding import Decodings

EXAMPLES = """\
  python scripts/decoding.py
  python scripts/decoding.py --model smollm2 --prompt "The best thing about Paris is"
  python scripts/decoding.py --temperature 1.5 --top-k 0 --top-p 1 --seed 7
  python scripts/decoding.py --json | python -m json.tool"""

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

    from tinyllama.bench.decoding import compare_decodings

    found = compare_decodings(model, tokenizer, args.prompt, settings)
    if args.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        show(found)
    return 0 if found.decoding["greedy"].identical and found.decoding["seed"].identical else 1


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


def show(found: Decodings) -> None:
    """Both tables and the verdicts, for a reader."""
    from rich.box import HORIZONTALS
    from rich.table import Column, Table
    from rich.text import Text

    console = TableConsole()
    chosen = ", ".join(f"{name} {value}" for name, value in found.settings.items() if name != "seed")
    seed = f"sampled, seed {found.settings['seed']}"
    titles = {"greedy": "greedy", "no seed": "sampled, no seed", "seed": seed}
    runs = (Column(name, ratio=1) for name in ("first run", "second run"))
    texts = Table(Column("", no_wrap=True), *runs, box=HORIZONTALS, show_lines=True)
    for name, pair in found.decoding.items():
        texts.add_row(titles[name], *(Text(escape(text, keep="\n")) for text in pair.texts))
    console.print(Text(f"prompt: {escape(found.prompt)}"))
    console.print(f"sampled: {chosen}", texts, sep="\n")
    for name, pair in found.decoding.items():
        console.print(f"{titles[name]}: {VERDICTS[name, pair.identical]}")

    measured = (Column(name, justify="right") for name in ("kept for a backward pass", "median time"))
    costs = Table(f"one forward pass of {found.pass_tokens} tokens", *measured, box=HORIZONTALS)
    for name, cost in found.passes.items():
        costs.add_row(name, f"{cost.saved_bytes:,} bytes", f"{cost.median_seconds * 1000:.0f} ms")
    console.print("", costs, sep="\n")


if __name__ == "__main__":
    terminal.run(main)
