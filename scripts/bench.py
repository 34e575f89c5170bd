"""Measure speed beside transformers and llama.cpp in one run, on TinyLlama's shape with random weights.

Every round measures each peer in turn on the same weights. Quote ratios: absolute figures change with the
machine's load and the speed of its memory. A peer that is not installed is left out; one line says so.
Under torchrun our model is also measured as the ranks share it. A peer in one process runs on rank 0 then,
with the threads of all ranks on its machine, while the others wait.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.bench.peers import DEFAULT, DEFAULT_ON_GPU, DEFAULT_ON_RANKS, NAMES, ON_RANKS, require
from tinyllama.cli import options, together
from tinyllama.cli.terminal import run
from tinyllama.progress import TableConsole, note

if TYPE_CHECKING:
    from tinyllama.bench.results import Results
    from tinyllama.parallel.ranks import Ranks

WIDTH = 100  # columns, where the output is no terminal
# Option -> type, default, default with --quick, meaning.
SIZES: dict[str, tuple[Callable[[str], Any], Any, Any, str]] = {
    "--rounds": (options.positive, 5, 2, "that count; one more comes first, as warm-up"),
    "--load-rounds": (options.count, 3, 1, "of loads; 0 leaves them out, as torchrun does"),
    "--steps": (options.positive, 32, 8, "decode steps in each measurement"),
    "--contexts": (options.numbers, (64, 1900), (64, 512), "tokens before these steps"),
    "--prefill": (options.count, 512, 128, "tokens of the prompt; 0 leaves it out"),
    "--rows": (options.count, 8, 8, "texts in the batch; 0 leaves it out"),
}

EXAMPLES = f"""\
  python scripts/bench.py --quick
  python scripts/bench.py --png bench.png --json bench.json
  python scripts/bench.py --peers stored int8 llama.cpp-F16 --load-rounds 0
  python scripts/bench.py --busy 2 --peers stored transformers-bfloat16    beside two busy programs
  python scripts/bench.py --profile --peers stored --contexts 64,1900      where a token's time goes
  python scripts/bench.py --model smollm2
  torchrun --nproc-per-node 2 scripts/bench.py --peers int8 int8-exact int8-fast     on two processes

peers: {", ".join(NAMES)}
(a name without a hyphen is our model in that weight mode: see --weights of generate.py; graph is exact with
decode steps recorded as a CUDA graph)
under torchrun also: {", ".join(ON_RANKS)}
(our model in that weight mode, shared by all ranks: exact keeps the bits of one process, fast sends half as
many messages; see docs/parallel.md)"""


def main() -> int:
    """Measure, print a table or JSON, and draw."""
    args = parse()
    ranks = options.join(args)
    if ranks is not None and ranks.rank > 0:
        from tinyllama.bench.on_ranks import serve

        serve(ranks, args.model)
        return 0
    if args.png is not None:
        require("matplotlib", "pip install matplotlib, or leave --png out")
    with tempfile.TemporaryDirectory(prefix="tinyllama-bench-") as scratch:
        results = measure(args, Path(scratch), ranks)
    if args.json == "-":
        print(json.dumps(asdict(results), indent=1, allow_nan=False))
    else:
        show(results)
    if args.json not in (None, "-"):
        from tinyllama.checkpoints.files import replace_text

        replace_text(Path(args.json), json.dumps(asdict(results), indent=1, allow_nan=False) + "\n")
        note(f"wrote {args.json}")
    if args.png is not None:
        from tinyllama.bench.chart import write_png

        write_png(args.png, results)
        note(f"wrote {args.png}")
    return 0


def measure(args: argparse.Namespace, scratch: Path, ranks: Ranks | None) -> Results:
    """What the options ask for; of several ranks, rank 0 measures.

    Raises:
        InputError: the device, the model or the sizes cannot be used.
    """
    import torch

    from tinyllama import InputError, LlamaConfig, resolve
    from tinyllama.bench import measure, profile
    from tinyllama.bench.on_ranks import directing
    from tinyllama.bench.peers import Setup
    from tinyllama.bench.random_checkpoint import write_random_checkpoint
    from tinyllama.bench.results import Run
    from tinyllama.checkpoints.config_file import read_config
    from tinyllama.device import machine, usable_device

    usable_device(args.device)
    folder = scratch if args.model is None else resolve(args.model)
    config = LlamaConfig() if args.model is None else read_config(folder)
    plan = measure.Plan(args.rounds, args.load_rounds, args.steps, args.contexts, args.prefill, args.rows)
    if plan.longest > config.context:
        raise InputError(
            f"sizes: {plan.longest} tokens do not fit the context of {config.context}; give "
            "smaller --contexts or --prefill, or fewer --steps"
        )
    parameters = sum(config.parameters.values())
    if args.model is None:
        note(f"drawing {parameters / 1e6:,.0f} million random weights")
        write_random_checkpoint(config, folder)
    threads = torch.get_num_threads() * together.size_here()
    torch.set_num_threads(threads)
    about = Run(
        command=together.command("bench"),
        machine=machine() | {"llama_cpp_python": llama_cpp_version()},
        model="random weights" if args.model is None else str(folder),
        parameters=parameters,
        device=args.device,
        dtype=args.dtype,
        busy=args.busy,
    )
    setup = Setup(
        str(folder),
        str(scratch),
        args.device,
        args.dtype,
        plan.longest,
        threads,
        together.size_here(),
        **options.shared(args),
    )
    measured = profile.measure_profiles if args.profile else partial(measure.measure_speeds, ranks=ranks)
    with measure.busy(args.busy), directing(ranks, setup) if ranks else nullcontext():
        return measured(about, args.peers, setup, plan, measure.Limits(args.device))


def show(results: Results) -> None:
    """Print the results as tables."""
    from tinyllama.bench import table

    console = TableConsole()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table.show(console, results)


def llama_cpp_version() -> str | None:
    """That of llama-cpp-python; None if it is not installed."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--model", metavar="NAME", help="a folder, a name on the Hub or smollm2 (default: random weights)"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=(*NAMES, *ON_RANKS),
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT)}; on a GPU {' '.join(DEFAULT_ON_GPU)}; under torchrun "
        f"{' '.join(DEFAULT_ON_RANKS)}",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of our model's activations (default: %(default)s)",
    )
    parser.add_argument(
        "--busy",
        type=options.count,
        default=0,
        metavar="N",
        help="keep N other processes computing meanwhile, as on a laptop in use (default: %(default)s)",
    )
    parser.add_argument("--profile", action="store_true", help="show where a token's time goes (of stored)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    parser.add_argument(
        "--json", metavar="FILE", help="write every figure as JSON; - prints it instead of tables"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the speeds")
    options.add_pipeline_option(parser)
    group = parser.add_argument_group("sizes")
    for name, (kind, full, quick, meaning) in SIZES.items():
        shown = "; ".join(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (full, quick))
        metavar = "N,N" if kind is options.numbers else "N"
        group.add_argument(
            name, type=kind, metavar=metavar, help=f"{meaning} (default, and with --quick: {shown})"
        )
    args = parser.parse_args()
    alone = together.size() == 1
    if not alone:
        check_ranks(parser, args)
        args.load_rounds = 0  # a load is that of a process of its own
    for name, (_, full, quick, _) in SIZES.items():
        if getattr(args, field := name[2:].replace("-", "_")) is None:
            setattr(args, field, quick if args.quick else full)
    default = DEFAULT if args.device == "cpu" else DEFAULT_ON_GPU
    default = default if alone else DEFAULT_ON_RANKS
    args.peers = args.peers or (("stored",) if args.profile else default)
    check(parser, args)
    return args


def check_ranks(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 on options that several ranks cannot take."""
    if args.profile:
        parser.error("--profile watches one process; start it by python, not by torchrun")
    if args.load_rounds:
        parser.error("--load-rounds: loads are measured in one process; start it by python, not by torchrun")
    if args.model is None and together.size_here() < together.size():
        parser.error(
            "--model: expected a folder that every machine has, as the ranks are on several; random weights "
            "would be on the first alone"
        )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 on options that do not go together, before anything is measured."""
    if together.size() == 1 and (shared := [name for name in args.peers if name in ON_RANKS]):
        parser.error(f"--peers {shared[0]} is for several ranks; start the script by torchrun")
    if 0 in args.contexts:
        parser.error("--contexts: expected 1 or more, got 0")
    if args.profile and args.png is not None:
        parser.error("--png draws speeds; leave --profile out")
    if args.profile and (args.device != "cpu" or any(name.startswith("llama") for name in args.peers)):
        parser.error("--profile measures our model and transformers on the CPU")
    if together.rank() > 0:
        return  # rank 0 writes
    options.check_output(parser, "--png", args.png)
    if args.json not in (None, "-"):
        options.check_output(parser, "--json", Path(args.json))


if __name__ == "__main__":
    run(main, ranks=True)
