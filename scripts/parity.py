"""Judge logits, ids and gradients by transformers' own error against a float64 oracle.

relRMS, KL and top-1 are measured against the oracle. R is the larger relRMS of
transformers with eager and with sdpa attention: up to 2 R passes in float32, up
to 1.5 R in 16 bits. "bits" says whether every logit equals, bit by bit, that of
transformers with the same attention. Where something fails, the first operation
that diverges is named, with a suspect. Under torchrun the ranks share each model:
rank 0 judges it beside the same model in one process, whose bits it should have.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli import options, together
from tinyllama.cli.terminal import read_text, run
from tinyllama.progress import note, progress_line

if TYPE_CHECKING:
    from tinyllama.parity.on_ranks import OnRanks
    from tinyllama.parity.subjects import Extent, Subject
    from tinyllama.parity.suite import Suite

SHAPE = "tinyllama-shape"
DTYPES = ["float64", "float32", "bfloat16", "float16"]  # widest first, as the suite takes them

EXAMPLES = """\
  python scripts/parity.py                              every model at hand, and TinyLlama's shape
  python scripts/parity.py --quick                      the embedded model, in a minute
  python scripts/parity.py smollm2 --dtype float32 --bisect
  python scripts/parity.py weights/my-conversion --against smollm2
  python scripts/parity.py smollm2 --attention my_attention.py:attend
  python scripts/parity.py smollm2 --attention fast.py:window --against slow.py:window
  python scripts/parity.py smollm2 --text my.txt --json > figures.json
  torchrun --nproc-per-node 2 scripts/parity.py smollm2 --quick

needs transformers: pip install "tinyllama[parity]", or make setup
exit status: 0 when everything passes, 1 on a mismatch, 2 on bad input"""


def main() -> int:
    """Compare, print the results, and return 1 if anything fails."""
    args = parse()
    from tinyllama.checkpoints.files import replace_text
    from tinyllama.pages import plain
    from tinyllama.parity.page import page
    from tinyllama.parity.suite import Suite
    from tinyllama.parity.tables import show

    start, on_ranks = time.perf_counter(), join(args)
    if on_ranks is not None and together.rank() > 0:
        on_ranks.serve()
        return 0
    with progress_line() as done:
        suite = Suite(args.bisect, done, on_ranks)
        judge(args, suite)
    if on_ranks is not None:
        on_ranks.end()
    report = suite.report
    report.machine |= {
        "command": together.command("parity"),
        "finished": datetime.now(timezone.utc).isoformat(" ", "seconds"),
        "seconds": round(time.perf_counter() - start),
    }
    if args.json:
        print(json.dumps(plain(report), indent=1, allow_nan=False))
    else:
        show(report)
    if args.html is not None:
        replace_text(args.html, page(report))
        note(f"wrote {args.html}")
    return 0 if report.passed else 1


def join(args: argparse.Namespace) -> OnRanks | None:
    """The processes that torchrun started, which are to share each model; None without it."""
    from tinyllama import InputError

    shared, ranks = options.shared(args), options.join(args)
    if ranks is None:
        return None
    if args.against is not None or SHAPE in args.models:
        raise InputError(
            f"several ranks share checkpoints, beside transformers; leave --against and {SHAPE} out, or "
            "start it by python"
        )
    from tinyllama.parity.on_ranks import OnRanks

    return OnRanks(ranks, **shared)


def judge(args: argparse.Namespace, suite: Suite) -> None:
    """Have the suite judge what the options ask for."""
    from tinyllama.device import usable_device
    from tinyllama.lab.kernel_file import load_kernel

    usable_device(args.device)  # before weights are drawn or read
    kernels = {spec: load_kernel(spec) for spec in args.attention or ["eager", "sdpa"]}
    alone = together.size() == 1
    subjects = [subject(name, args) for name in args.models or default_models(args.quick or not alone)]
    if args.against is None:
        for one in subjects:
            suite.judge(one, kernels, extent(args, one))
        if not args.models and not args.attention and alone:
            suite.judge_fixture()
    elif is_kernel(args.against):
        other = load_kernel(args.against)
        for one in subjects:
            for spec, kernel in kernels.items():
                suite.judge_kernel(one, (spec, args.against), kernel, other, extent(args, one))
    else:
        other_model = subject(args.against, args)
        for one in subjects:
            suite.judge_checkpoint(one, other_model, kernels, extent(args, one))


def default_models(quick: bool) -> list[str]:
    """The models that need no download."""
    from tinyllama.checkpoints.hub import DEFAULT_MODEL, EMBEDDED_MODEL, on_disk

    if quick:
        return [EMBEDDED_MODEL]
    return [EMBEDDED_MODEL, *([DEFAULT_MODEL] if on_disk(DEFAULT_MODEL) else []), SHAPE]


def subject(name: str, args: argparse.Namespace) -> Subject:
    """The model of that name, with the texts to compare it on."""
    from tinyllama import LlamaConfig, Tokenizer
    from tinyllama.checkpoints.hub import DEFAULT_MODEL, on_disk, resolve
    from tinyllama.parity.subjects import Checkpoint, Shape

    if name == SHAPE:
        return Shape(SHAPE, LlamaConfig(), args.device)
    folder = resolve(name)
    tokenizer = Tokenizer.from_folder(folder)
    known = on_disk(DEFAULT_MODEL)
    official = known is not None and folder.samefile(known)
    return Checkpoint(folder.resolve().name, folder, tokenizer, args.text, official, args.device)


def extent(args: argparse.Namespace, one: Subject) -> Extent:
    """How much of a model is compared, in the dtypes that the options name."""
    from tinyllama.parity.subjects import FULL, LARGE, LARGE_PARAMETERS, QUICK

    large = sum(one.config.parameters.values()) > LARGE_PARAMETERS
    chosen = QUICK if args.quick else LARGE if large else FULL
    if not args.dtype:
        return chosen
    return replace(chosen, dtypes=tuple(dtype for dtype in DTYPES if dtype in args.dtype))


def is_kernel(against: str) -> bool:
    """Whether --against names a kernel, not a checkpoint."""
    from tinyllama.lab.kernel_file import BUILT_IN

    return ".py:" in against or against.partition(":")[0] in BUILT_IN


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"names or folders; {SHAPE} is random weights"
    )
    parser.add_argument("--quick", action="store_true", help="fewer dtypes, positions and continuations")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be repeated (default: all four)"
    )
    parser.add_argument(
        "--attention",
        action="append",
        metavar="KERNEL",
        help="eager, sdpa, a variant or file.py:function; may be repeated (default: eager and sdpa)",
    )
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="what is right: another checkpoint or another kernel (default: transformers)",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="compare on this text, not on ours; may be repeated",
    )
    parser.add_argument(
        "--bisect", action="store_true", help="look for the first divergence even where everything passes"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    options.add_rank_options(parser)
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the results as a page")
    args = parser.parse_args()
    options.check_output(parser, "--html", args.html)
    if args.text and SHAPE in args.models:
        parser.error(f"--text: {SHAPE} has random weights and no tokenizer; leave one of them out")
    # Here, once for all models, because stdin can be read only once.
    first = together.rank() == 0  # it reads for all
    args.text = {file: read_text(file) if first else "" for file in args.text} if args.text else None
    return args


if __name__ == "__main__":
    run(main, ranks=True)
