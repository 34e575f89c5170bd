"""Change attention, and see what it did: contract, perplexity, heads, speed, memory and text, side by side.

A kernel is a function of (q, k, v, context) in a file of yours, or one of the
built-in variants; settings may follow its name. Each is compared with the
unchanged model. For a kernel that breaks the contract, only the smallest
example that breaks it is shown, unless that is meant (--breaks).
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli import options, together
from tinyllama.cli.terminal import read_text, run
from tinyllama.progress import TableConsole, note, progress_line

if TYPE_CHECKING:
    from tinyllama import Llama, Tokenizer
    from tinyllama.lab.change import Change
    from tinyllama.lab.scorecard import Subject

TEXTS = ("english", "code")
PROMPTS = 1

EXAMPLES = """\
  python scripts/lab.py window --layers 8-21
  python scripts/lab.py my_attention.py:window --model smollm2 --html lab.html
  python scripts/lab.py window:size=64 sinks:first=4,size=60 --text book.txt
  python scripts/lab.py ablate --layers 3 --heads 0 --json > card.json
  python scripts/lab.py --new my_attention.py           a kernel to begin with
  python scripts/lab.py --list                          the built-in variants
  python scripts/lab.py --addresses --model smollm2     what can be captured and patched
  python scripts/lab.py --capture "layers.*.self_attn.z"        what that costs
  torchrun --nproc-per-node 2 scripts/lab.py window                on two processes that share the model

exit status: 0, 1 if a kernel breaks the contract, 2 on bad input"""


def main() -> int:
    """Measure the kernels, print the scorecard, and return 1 if one breaks the contract."""
    args = parse()
    if args.list:
        show_variants()
        return 0
    if args.new:
        if together.rank() == 0:
            write_kernel(args.new, args.with_weights)
        return 0

    changes = read_changes(args)
    model, tokenizer = options.load(args)
    from tinyllama.checkpoints.files import replace_text
    from tinyllama.lab import tables
    from tinyllama.lab.figures import Extent
    from tinyllama.lab.page import page
    from tinyllama.lab.scorecard import scorecard

    console = TableConsole()
    if args.addresses:
        tables.show_addresses(console, model, args.tokens)
        return 0
    if args.capture:
        show_overhead(model, tokenizer, args)
        return 0
    for change in changes:
        with change.applied(model):  # refuses an unknown layer or head before anything is measured
            pass
    extent = Extent(context=args.tokens // 2, rounds=args.rounds, new_tokens=args.new_tokens)
    with progress_line() as done:
        card = scorecard(subject(model, tokenizer, args), changes, extent, done)
    card.machine["command"] = together.command("lab")
    if args.json:
        print(json.dumps(asdict(card), indent=1, allow_nan=False))
    else:
        tables.show(console, card)
    if args.html is not None and together.rank() == 0:
        replace_text(args.html, page(card))
        note(f"wrote {args.html}")
    return 0 if all(one.passed for one in card.changes) else 1


def write_kernel(path: Path, with_weights: bool) -> None:
    """Write a kernel to begin with, and say how to run it."""
    from tinyllama.lab.new import new_kernel

    new_kernel(path, with_weights)
    print(f"wrote {path}; now try: python scripts/lab.py {shlex.quote(str(path))}:attend --model smollm2")


def read_changes(args: argparse.Namespace) -> list[Change]:
    """The kernels and where they go; a healed one goes where it was trained."""
    from tinyllama import InputError
    from tinyllama.lab.change import Change
    from tinyllama.lab.clauses import breaks
    from tinyllama.lab.healed import load_healed
    from tinyllama.lab.kernel_file import load_kernels, trusted_kernel

    kernels = load_kernels(args.kernels)
    if args.breaks:
        kernels = {spec: breaks(*args.breaks)(kernel) for spec, kernel in kernels.items()}
    changes = [Change(spec, kernel, args.layers, args.heads) for spec, kernel in kernels.items()]
    for path in args.healed or []:
        healed = load_healed(path)
        settings, name = healed.settings, f"{healed.settings.kernel}, healed {len(healed.losses)} steps"
        try:
            kernel = trusted_kernel(settings.kernel, args.kernels)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        changes.append(Change(name, kernel, settings.layers, settings.heads, healed.weights))
    return changes


def subject(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace) -> Subject:
    """The model, the texts that it reads and the prompts that it continues."""
    from tinyllama import InputError
    from tinyllama.lab.scorecard import Subject
    from tinyllama.parity import texts

    length = min(args.tokens, model.config.context)

    def encoded() -> dict[str, list[int]]:
        if args.text:
            return {name: tokenizer.encode(text)[:length] for name, text in args.text.items()}
        return {name: texts.encoded(tokenizer, name, length) for name in TEXTS}

    read = together.share(encoded)
    for name, ids in read.items():
        if len(ids) < 2:
            raise InputError(f"{name}: expected a text of 2 tokens at least, got {len(ids)}; give more text")
    prompts = {prompt: tokenizer.encode(prompt) for prompt in args.prompt or texts.PROMPTS[:PROMPTS]}
    # Long ones too: a window acts on nothing shorter.
    for name, ids in read.items():
        for count in (len(ids) // 2, len(ids) * 7 // 8):
            prompts[f"{name}, its first {count} tokens"] = ids[:count]
    return Subject(model, tokenizer, read, prompts)


def show_variants() -> None:
    """Print the built-in kernels with the first lines of their docstrings."""
    import inspect

    from tinyllama.lab.kernel_file import VARIANTS

    for name, kernel in VARIANTS.items():
        settings = list(inspect.signature(kernel).parameters.values())[4:]  # after q, k, v and context
        spec = ":".join([name, ",".join(f"{one.name}={one.default}" for one in settings)]).rstrip(":")
        first, *_ = (inspect.getdoc(kernel) or "").splitlines()
        print(f"{spec:<24} {first}")


def show_overhead(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Print what a capture costs, and what the taps cost without one."""
    from tinyllama.lab.speed import overhead

    (ids, *_) = subject(model, tokenizer, args).texts.values()
    cost = overhead(model, args.capture, ids, max(args.rounds, 1))
    steps = [
        (f"a text of {len(ids)} tokens", cost.plain, cost.watched),
        ("one token more, from the cache", cost.plain_step, cost.watched_step),
    ]
    for what, plain, watched in steps:
        print(
            f"{what}: {plain * 1e3:.1f} ms, of which the taps take {cost.taps * 1e3:.2f} ms "
            f"({cost.taps / plain:.1%}); with the capture {watched * 1e3:.1f} ms ({watched / plain - 1:+.1%})"
        )
    print(f"captured of the text: {cost.captured / 1e6:.1f} MB")


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="a variant's name, or file.py:function")
    options.add_place_options(parser)
    parser.add_argument(
        "--breaks",
        type=lambda text: text.split(","),
        metavar="CLAUSE,...",
        help="measure the kernels although they break these clauses of the contract",
    )
    parser.add_argument(
        "--healed",
        action="append",
        type=Path,
        metavar="FILE",
        help="also measure the layers that heal.py wrote; a kernel from a file must be named as well",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="read this file instead of the bundled texts; may be repeated",
    )
    parser.add_argument(
        "--tokens",
        type=options.count,
        default=1024,
        metavar="N",
        help="tokens of each text to read (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt to continue; may be repeated"
    )
    parser.add_argument(
        "--new-tokens",
        type=options.count,
        default=32,
        metavar="N",
        help="tokens of each continuation (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=options.count,
        default=3,
        metavar="N",
        help="rounds of timing (default: %(default)s)",
    )
    parser.add_argument("--new", type=Path, metavar="FILE", help="write a kernel to begin with")
    parser.add_argument("--with-weights", action="store_true", help="with --new: one that is trained")
    parser.add_argument("--list", action="store_true", help="list the built-in variants")
    parser.add_argument("--addresses", action="store_true", help="list the addresses of the model's values")
    parser.add_argument(
        "--capture",
        action="append",
        metavar="ADDRESS",
        help="time a pass that captures this address; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write them as an HTML page")
    options.add_model_options(parser)
    options.add_rank_options(parser)
    args = parser.parse_args()
    if not (args.kernels or args.healed or args.list or args.addresses or args.capture or args.new):
        parser.error("no kernel: give one, --new FILE for one to begin with, or --list for the built-in ones")
    if args.with_weights and not args.new:
        parser.error("--with-weights: goes with --new FILE")
    if args.tokens < 4:
        parser.error(f"--tokens: expected 4 or more, got {args.tokens}")
    options.check_output(parser, "--html", args.html)
    # Here and not later: stdin can be read only once.
    first = together.rank() == 0  # it reads for all
    args.text = {file: read_text(file) if first else "" for file in args.text} if args.text else None
    return args


if __name__ == "__main__":
    run(main, ranks=True)
