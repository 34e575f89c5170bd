"""Measure speed beside transformers and llama.cpp in one run, on TinyLlama's shape with random weights.

Every round measures each subject in turn over the same weights, and what the
machine itself can read and multiply beside them. Quote the ratios: absolute
figures drift with whatever else the machine does. Peers that are not installed
are left out, and the output says so. The full run takes a long while: --quick
is a short one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.cli import options
from tinyllama.cli.terminal import run
from tinyllama.progress import note, progress_line, step_progress

if TYPE_CHECKING:
    from tinyllama import LlamaConfig
    from tinyllama.bench.sizes import Sizes

CONTEXTS, PREFILLS = (64, 512, 1900), (128, 512, 1900)
QUICK_CONTEXTS, QUICK_PREFILLS = (64, 512), (128,)
LONGEST_ON_GPU = 2048
WIDTH = 100  # columns
CHART_ROUNDS = 2  # of figures that only the chart shows

EXAMPLES = """\
  python scripts/bench.py --quick
  python scripts/bench.py --png bench.png --json bench.json
  python scripts/bench.py --only ours-mixed --only llama.cpp --rounds 3 --load-rounds 0
  python scripts/bench.py --profile --mode ours-int8 --context 64 --context 1900
  python scripts/bench.py --quality                 what the fast modes cost, on SmolLM2
  python scripts/bench.py --products                what each matrix product is worth
  python scripts/bench.py --config weights/SmolLM2-135M-Instruct/config.json

subjects: ours-exact, ours-float32, ours-mixed (bfloat16 weights, float32 activations), ours-bfloat16,
ours-int8, ours-int8-bfloat16, hf-float32, hf-bfloat16, hf-compiled-float32, hf-compiled-bfloat16,
llama.cpp-f16, llama.cpp-q8; a beginning such as hf stands for all with it"""


def main() -> int:
    """Measure, print tables or JSON, and draw."""
    args = parse()
    results = measured(args)
    if args.json is not None:
        from tinyllama.checkpoints.files import replace_text

        text = json.dumps(results, indent=1, allow_nan=False)
        if args.json == "-":
            print(text)
        else:
            replace_text(Path(args.json), text + "\n")
            note(f"wrote {args.json}")
    if args.json != "-":
        show(results)
    if args.png is not None:
        from tinyllama.bench.charts import write_png

        write_png(args.png, results)
        note(f"wrote {args.png}")
    return 0


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, with the machine and the settings."""
    from tinyllama import LlamaConfig
    from tinyllama.bench.charts import require_matplotlib
    from tinyllama.checkpoints.files import read_json
    from tinyllama.device import machine, usable_device

    usable_device(args.device)
    if args.png is not None:
        require_matplotlib()
    results: dict[str, Any] = {"machine": {**machine(), "llama_cpp_python": llama_cpp_version()}}
    results["settings"] = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    results["settings"]["command"] = shlex.join(["python", "scripts/bench.py", *sys.argv[1:]])
    if args.quality:
        return results | {"quality": quality()}
    if args.products:
        return results | {"products": products(args.rounds)}
    config = LlamaConfig() if args.config is None else LlamaConfig.from_dict(read_json(args.config))
    results["settings"]["parameters"] = sum(config.parameters.values())
    with tempfile.TemporaryDirectory(prefix="tinyllama-bench-") as folder:
        from tinyllama.bench.shape import write_random_checkpoint

        if not args.profile:
            from tinyllama.bench.names import chosen
            from tinyllama.bench.suite import measure

            (names, skipped), plan = chosen(args.only, args.float16, args.compiled), sizes(args, config)
        note(f"drawing {sum(config.parameters.values()) / 1e6:.0f} million bfloat16 weights")
        write_random_checkpoint(config, Path(folder))
        if args.profile:
            return results | {"profile": profile(Path(folder), config, args)}
        found = measure(Path(folder), config, names, args.device, plan, step_progress)
        found["left_out"] = skipped | found["left_out"]
        return results | found


def profile(folder: Path, config: LlamaConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Where a token's time goes in one mode, at each context."""
    from tinyllama import InputError
    from tinyllama.bench.breakdown import breakdown
    from tinyllama.bench.limits import Memory
    from tinyllama.bench.names import MODES
    from tinyllama.bench.ours import Ours
    from tinyllama.bench.sharing import sharing
    from tinyllama.bench.sizes import fitting

    longest = config.max_position_embeddings
    contexts = args.context or fitting((64, 1900), longest, args.steps + 1)
    if max(contexts, default=0) + args.steps + 1 > longest:
        raise InputError(f"--context: {max(contexts)} and {args.steps} steps exceed the context of {longest}")
    subject = Ours(args.mode, MODES[args.mode].load(folder, args.device))
    memory, parts = Memory(subject.device), []
    with progress_line() as done:
        for context in contexts:
            done(f"{args.mode} at {context}: operations")
            part = breakdown(subject, context, args.steps, args.rounds, memory.bandwidth)
            done(f"{args.mode} at {context}: KV heads")
            part["sharing"] = sharing(subject.model, context, part["step"], args.rounds)
            parts.append(part)
    return parts


def quality() -> dict[str, Any]:
    """What the fast modes cost, on the embedded model."""
    from tinyllama.bench import quality as measures
    from tinyllama.checkpoints.hub import resolve

    with progress_line() as done:
        return measures.quality(resolve("smollm2"), done=done)


def products(rounds: int) -> dict[str, Any]:
    """Matrix products by every way, on TinyLlama's gate and up projections."""
    from tinyllama import LlamaConfig
    from tinyllama.bench import products as measures
    from tinyllama.bench.limits import Memory
    from tinyllama.device import usable_device

    config, memory = LlamaConfig(), Memory(usable_device("cpu"))
    with step_progress(len(measures.WAYS)) as step:
        return measures.products(config.intermediate_size, config.hidden_size, rounds, memory.bandwidth, step)


def sizes(args: argparse.Namespace, config: LlamaConfig) -> Sizes:
    """How much is measured: what was given, else what fits the shape's context.

    Raises:
        InputError: what was given does not fit.
    """
    from tinyllama import InputError
    from tinyllama.bench.sizes import Sizes, fitting

    longest, on_cpu = config.max_position_embeddings, args.device == "cpu"
    lengths = PREFILLS if on_cpu else (*PREFILLS[:2], LONGEST_ON_GPU)
    plan = Sizes(
        rounds=args.rounds,
        chart_rounds=min(CHART_ROUNDS, args.rounds),
        load_rounds=args.load_rounds,
        prompt=args.prompt,
        steps=args.steps,
        contexts=args.contexts
        or fitting(QUICK_CONTEXTS if args.quick else CONTEXTS, longest, args.steps + 1),
        prefills=args.prefills or fitting(QUICK_PREFILLS if args.quick else lengths, longest),
        prefill=args.prefill or min(512 if on_cpu else LONGEST_ON_GPU, longest),
        rows=args.rows,
    )
    needed = max(*plan.contexts, plan.prompt, 0) + plan.steps + 1
    if max(needed, *plan.prefills, plan.prefill) > longest:
        raise InputError(
            f"sizes: {max(needed, *plan.prefills, plan.prefill)} tokens do not fit the shape's context of "
            f"{longest}; give smaller contexts or prefills, or fewer steps"
        )
    return plan


def llama_cpp_version() -> str | None:
    """That of llama-cpp-python, if it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    from rich.console import Console

    from tinyllama.bench import profile_tables, tables

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = max(console.width, WIDTH)
    if "profile" in results:
        profile_tables.show_profile(console, results)
    elif "products" in results:
        from tinyllama.bench.products import show_products

        show_products(console, results)
    elif "quality" in results:
        profile_tables.show_quality(console, results)
    else:
        tables.show(console, results)


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes, no compiled peers")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="measure this subject; may be repeated"
    )
    parser.add_argument(
        "--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out"
    )
    parser.add_argument("--float16", action="store_true", help="measure transformers in float16, too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a config.json (default: TinyLlama-1.1B's)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write every figure as JSON; - prints it instead of tables"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw speeds and the roofline")
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--rounds", type=options.positive, metavar="N", help="of speeds (default: 7; quick: 2)"
    )
    group.add_argument(
        "--load-rounds", type=options.count, metavar="N", help="of loads (default: 5; quick: 1)"
    )
    group.add_argument(
        "--prompt", type=options.positive, default=16, metavar="N", help="default: %(default)s"
    )
    group.add_argument(
        "--steps", type=options.positive, metavar="N", help="of decoding (default: 32; quick: 8)"
    )
    group.add_argument("--contexts", type=options.numbers, metavar="N,N", help="default: 64,512,1900")
    group.add_argument("--prefills", type=options.numbers, metavar="N,N", help="default: 128,512,1900")
    group.add_argument(
        "--prefill", type=options.positive, metavar="N", help="that of the goals (default: 512)"
    )
    group.add_argument(
        "--rows", type=options.count, default=8, metavar="N", help="batch (default: %(default)s)"
    )
    group = parser.add_argument_group("other measurements, in place of the table")
    group.add_argument("--profile", action="store_true", help="where a token's time goes in one mode")
    group.add_argument("--mode", default="ours-mixed", metavar="NAME", help="which (default: %(default)s)")
    group.add_argument(
        "--context",
        action="append",
        type=options.positive,
        metavar="N",
        help="may be repeated (default: 64, 1900)",
    )
    group.add_argument("--quality", action="store_true", help="KL, top-1, perplexity of the modes on SmolLM2")
    group.add_argument("--products", action="store_true", help="matrix products by each way that there is")
    args = parser.parse_args()
    defaults = {"rounds": (7, 2), "load_rounds": (5, 1), "steps": (32, 8)}
    for name, (full, quick) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    args.compiled = args.compiled and not args.quick
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 on options that do not go together, before anything is measured."""
    from tinyllama.bench.names import MODES

    others = [name for name in ("profile", "quality", "products") if getattr(args, name)]
    if len(others) > 1:
        parser.error(f"give --{others[0]} or --{others[1]}, not both")
    if args.png is not None and others:
        parser.error(f"--png draws the table of speeds; leave --{others[0]} out")
    if args.mode not in MODES:
        parser.error(f"--mode: expected one of {', '.join(MODES)}, got {args.mode!r}")
    if args.contexts and 0 in args.contexts:
        parser.error("--contexts: expected 1 or more, got 0")
    options.check_output(parser, "--png", args.png)
    if args.json not in (None, "-"):
        options.check_output(parser, "--json", Path(args.json))


if __name__ == "__main__":
    run(main)
