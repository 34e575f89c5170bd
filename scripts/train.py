"""Train small Llamas from scratch with different attentions, and see which one learns better.

Every kernel reads the same windows of the text in the same order and begins with the same weights; several
seeds say how certain a difference is. What is trained is an ordinary checkpoint folder: generate.py, lab.py
and parity.py take it by --model.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli import options
from tinyllama.cli.terminal import read_text, run
from tinyllama.errors import InputError
from tinyllama.progress import TableConsole, note, step_progress

if TYPE_CHECKING:
    from tinyllama.lab.findings import Finding
    from tinyllama.lab.from_scratch import Recipe, Run

HELD_OUT = 0.1  # of the text
SIZES = {"k": 10**3, "M": 10**6, "G": 10**9}

EXAMPLES = """\
  python scripts/train.py sdpa window:size=64 --text book.txt
  python scripts/train.py sdpa my_attention.py:mine --text corpus/ --size 3M --steps 400 --seeds 3
  python scripts/generate.py "Once upon" --model trained/sdpa-0

Ctrl-C ends; the same command goes on from the last reading of the held-out text."""


def main() -> int:
    """Train every kernel with every seed, and print a table and a verdict."""
    args = parse()
    import torch

    from tinyllama.lab.findings import findings
    from tinyllama.lab.from_scratch import Recipe, shape, train, untrained
    from tinyllama.lab.kernel_file import load_kernel
    from tinyllama.lab.trained import byte_tokenizer, digest
    from tinyllama.text.tokenizer import Tokenizer

    kernels = {name: load_kernel(name) for name in args.kernels}
    text = corpus(args.text)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be made ({error.strerror})") from error
    note(f"a vocabulary of {args.vocab} from {len(text):,} characters")
    byte_tokenizer(text, args.vocab, args.out)
    tokenizer = Tokenizer.from_folder(args.out)
    ids = tokenizer.encode(text)
    cut = int(len(ids) * (1 - HELD_OUT))
    config = shape(args.size, tokenizer.vocab_size, args.length)
    recipe = Recipe(
        text=digest(text),
        steps=args.steps,
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        warm_up=min(20, args.steps // 5),
        accumulate=args.accumulate,
        autocast=None if args.dtype == "float32" else args.dtype,
    )
    total = sum(config.parameters.values())
    note(f"{total:,} parameters; the text has {len(ids):,} tokens, and every run reads {recipe.tokens:,}")
    runs: dict[str, list[Run]] = {name: [] for name in kernels}
    for seed in range(args.seeds):
        for name, kernel in kernels.items():
            folder = args.out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{seed}"
            folder.mkdir(exist_ok=True)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).write_bytes((args.out / file).read_bytes())
            model = untrained(config, seed)
            with step_progress(args.steps) as step:
                held_out = ids[cut:][: args.held_out]
                for state in train(
                    model, name, kernel, torch.tensor(ids[:cut]), held_out, recipe, seed, folder
                ):
                    step(f"{name}, seed {seed}, loss {state.losses[-1]:.3f}")
            runs[name].append(state)
    if args.json:
        found = {"recipe": asdict(recipe), "parameters": total, "findings": list(map(asdict, findings(runs)))}
        print(json.dumps(found | {"runs": [asdict(one) for some in runs.values() for one in some]}, indent=1))
    else:
        show(runs, recipe, findings(runs))
    return 0


def corpus(path: Path) -> str:
    """The text of a file, or of all .txt and .md files of a folder."""
    if not path.is_dir():
        return read_text(str(path))
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
    if not files:
        raise InputError(f"--text {path}: expected .txt or .md files, found none")
    return "\n".join(read_text(str(file)) for file in files)


def show(runs: dict[str, list[Run]], recipe: Recipe, found: list[Finding]) -> None:
    """The held-out loss on the way, and the verdicts."""
    from rich.table import Column, Table

    table = Table("tokens read", *(Column(name, justify="right") for name in runs))

    def row(name: str, figure: Callable[[list[Run]], str]) -> None:
        table.add_row(name, *map(figure, runs.values()))

    for look, (steps, _) in enumerate(next(iter(runs.values()))[0].held_out):

        def mean(own: list[Run], look: int = look) -> str:
            return f"{statistics.mean(run.held_out[look][1] for run in own):.3f}"

        row(f"{steps * recipe.batch * recipe.length:,}", mean)
    ends = {name: [run.held_out[-1][1] for run in own] for name, own in runs.items()}
    if min(map(len, ends.values())) > 1:
        row("± over seeds", lambda own: f"{statistics.stdev(ends[own[0].kernel]):.3f}")
    row("tokens/s", lambda own: f"{statistics.median(run.tokens_per_second for run in own):,.0f}")
    TableConsole().print(table)
    print("The table has the loss of held-out text, in nats a token. Beside the first kernel:")
    for one in found[1:]:
        print(one)


def size(text: str) -> int:
    """`3M` as 3,000,000; for `type=`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a number such as 3M, got {text!r:.40}")
    return int(float(match[1]) * SIZES.get(match[2], 1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "kernels",
        nargs="+",
        metavar="KERNEL",
        help="variants' names, or file.py:function; the first is the base",
    )
    parser.add_argument(
        "--text", type=Path, required=True, metavar="PATH", help="a file, or a folder of .txt and .md"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("trained"), metavar="DIR", help="default: %(default)s"
    )
    for option, kind, default, text in (
        ("--size", size, size("3M"), "parameters (default: 3M)"),
        ("--steps", options.positive, 400, "of the optimizer (default: %(default)s)"),
        ("--seeds", options.positive, 3, "runs of each kernel (default: %(default)s)"),
        ("--batch", options.positive, 8, "windows a step (default: %(default)s)"),
        ("--length", options.positive, 128, "tokens a window (default: %(default)s)"),
        (
            "--accumulate",
            options.positive,
            1,
            "read a step's windows in so many parts (default: %(default)s)",
        ),
        ("--vocab", options.integers(257, 65536), 1024, "of the byte-level tokenizer (default: %(default)s)"),
        ("--held-out", options.positive, 8192, "tokens to measure on (default: %(default)s)"),
    ):
        parser.add_argument(option, type=kind, default=default, metavar="N", help=text)
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="the largest learning rate")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: by autocast"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    args = parser.parse_args()
    if not 0 < args.lr < 1:
        parser.error(f"--lr: expected a number between 0 and 1, got {args.lr}")
    return args


if __name__ == "__main__":
    run(main)
