"""Train small Llamas from scratch with different attentions, and see which one learns better.

Every kernel reads the same windows of the text in the same order and begins with the same weights; several
seeds say how certain a difference is. What is trained is an ordinary checkpoint folder: generate.py, lab.py
and parity.py take it by --model.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli import options, together
from tinyllama.cli.terminal import read_text, run
from tinyllama.errors import InputError
from tinyllama.progress import TableConsole, note, step_progress

if TYPE_CHECKING:
    from tinyllama.attention import Kernel
    from tinyllama.config import LlamaConfig
    from tinyllama.lab.training.experiment import Experiment
    from tinyllama.lab.training.from_scratch import Run
    from tinyllama.text.tokenizer import Tokenizer

HELD_OUT = 0.1  # of the text
SIZES = {"k": 10**3, "M": 10**6, "G": 10**9}
# Of the contract, what training relies on.
CLAUSES = ("shape", "pure", "causal", "batch", "gradient")

EXAMPLES = """\
  python scripts/train.py sdpa window:size=64 --text book.txt
  python scripts/train.py sdpa my_attention.py:mine --text corpus/ --size 3M --steps 400 --seeds 3
  python scripts/train.py sdpa alibi --text book.txt --tokenizer smollm2 --html training.html
  python scripts/generate.py "Once upon" --model trained/sdpa-0

Ctrl-C ends; the same command goes on from the last reading of the held-out text."""


def main() -> int:
    """Train every kernel with every seed, and print a table and a verdict."""
    args = parse()
    from tinyllama.checkpoints.files import replace_text
    from tinyllama.lab.kernel_file import load_kernel
    from tinyllama.lab.training.experiment import show
    from tinyllama.lab.training.page import page

    experiment = run_all(args, {name: load_kernel(name) for name in args.kernels})
    experiment.machine["command"] = together.command("train")
    if args.json:
        print(json.dumps(asdict(experiment), indent=1))
    else:
        show(TableConsole(), experiment)
    if args.html is not None:
        replace_text(args.html, page(experiment))
        note(f"wrote {args.html}")
    return 0


def run_all(args: argparse.Namespace, kernels: dict[str, Kernel]) -> Experiment:
    """Train every kernel with every seed."""
    import torch

    from tinyllama.checkpoints.hub import named_model
    from tinyllama.device import machine, usable_device
    from tinyllama.lab.contract import require_contract
    from tinyllama.lab.training.experiment import Experiment
    from tinyllama.lab.training.findings import findings
    from tinyllama.lab.training.folder import copy_tokenizer, digest, write_tokenizer
    from tinyllama.lab.training.from_scratch import Recipe, train, untrained
    from tinyllama.lab.training.speed import PEER, speeds
    from tinyllama.text.tokenizer import Tokenizer

    device, text = usable_device(args.device), corpus(args.text)
    make_folder(args.out)
    source = named_model(args.tokenizer) if args.tokenizer else None
    note(f"{len(text):,} characters, tokenizer: {args.tokenizer or f'byte-level, {args.vocab} tokens'}")
    write_tokenizer(text, args.vocab, source, args.out)
    tokenizer = Tokenizer.from_folder(args.out)
    ids = tokenizer.encode(text)
    cut = int(len(ids) * (1 - HELD_OUT))
    learnt, held_out = torch.tensor(ids[:cut]), ids[cut:][: args.held_out]
    config = shaped(args, tokenizer)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, kernel in kernels.items():
        note(f"{name}: contract")
        require_contract(name, kernel, CLAUSES, *heads)
    recipe = Recipe(
        text=digest(text),
        steps=args.steps,
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        warm_up=min(20, args.steps // 5),
        accumulate=args.accumulate,
        autocast=None if args.dtype == "float32" else args.dtype,
        compiled=args.compile,
    )
    total = sum(config.parameters.values())
    note(f"{total:,} parameters; the text has {len(ids):,} tokens, and every run reads {recipe.tokens:,}")
    runs: dict[str, list[Run]] = {name: [] for name in kernels}
    for seed in range(args.seeds):
        for name, kernel in kernels.items():
            folder = args.out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{seed}"
            make_folder(folder)
            copy_tokenizer(args.out, folder)
            model = untrained(config, seed).to(device)
            states = train(model, name, kernel, learnt, held_out, recipe, seed, folder)
            first = next(states)  # of a run that goes on, what was done before
            with step_progress(args.steps, len(first.losses) - 1) as step:
                for state in chain([first], states):
                    step(f"{name}, seed {seed}, loss {state.losses[-1]:.3f}")
            runs[name].append(state)
    shape = {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
        "parameters": total,
    }
    whole = [run for own in runs.values() for run in own]
    note("speed, in turn")
    speed = speeds(untrained(config, 0).to(device), kernels, learnt, recipe, peer=args.beside_transformers)
    found = findings(runs, speed)
    return Experiment(machine(), recipe, shape, len(learnt), found, whole, speed.get(PEER))


def shaped(args: argparse.Namespace, tokenizer: Tokenizer) -> LlamaConfig:
    """The models' config: of the size, or as a config.json has it, for the tokenizer's vocabulary."""
    from tinyllama.checkpoints.config_file import config_from_dict
    from tinyllama.checkpoints.files import read_json
    from tinyllama.lab.training.from_scratch import shape

    if args.config is None:
        config = shape(args.size, tokenizer.vocab_size, args.length)
    else:
        file = args.config / "config.json" if args.config.is_dir() else args.config
        config = replace(config_from_dict(read_json(file), str(file)), vocab_size=tokenizer.vocab_size)
        if config.max_position_embeddings < args.length:
            raise InputError(
                f"--length: expected {config.max_position_embeddings} or fewer, as {file} has positions for, "
                f"got {args.length}"
            )
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def make_folder(path: Path) -> None:
    """Make a folder unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be made ({error.strerror})") from error


def corpus(path: Path) -> str:
    """The text of a file, or of all .txt and .md files of a folder."""
    if not path.is_dir():
        return read_text(str(path))
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
    if not files:
        raise InputError(f"--text {path}: expected .txt or .md files, found none")
    return "\n".join(read_text(str(file)) for file in files)


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
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="a config.json, or its folder, in place of --size"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="of this model or folder (default: byte-level, of the text)",
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
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="by torch.compile: faster on a GPU")
    parser.add_argument(
        "--beside-transformers", action="store_true", help="also time its training, in turn with the kernels'"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write them as an HTML page")
    args = parser.parse_args()
    if not 0 < args.lr < 1:
        parser.error(f"--lr: expected a number between 0 and 1, got {args.lr}")
    options.check_output(parser, "--html", args.html)
    return args


if __name__ == "__main__":
    run(main)
