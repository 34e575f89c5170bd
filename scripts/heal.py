"""Change attention in some layers, train these layers for a while, and see how much of the damage goes away.

Shows the perplexity of held-out text (the last fifth) for the unchanged model,
after the change, and after training. Training also teaches the kind of text:
the same command with sdpa as the kernel shows how much of the gain that is. The
trained layers are written to a file; if it exists, training resumes from it.
Under torchrun each process has the whole model, and they share a step's windows:
the file is the same to the bit on any number of processes. With --split or
--pipeline they share the model instead. Either resumes the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import InputError
from tinyllama.cli import options, together
from tinyllama.cli.terminal import read_text, run
from tinyllama.progress import note, step_progress

if TYPE_CHECKING:
    from tinyllama import Llama, Ranks
    from tinyllama.lab.change import Change
    from tinyllama.lab.healed import Healed, Outcome, Settings
    from tinyllama.lab.perplexity import Perplexity

HELD_OUT = 0.2
# A small model that reads a text more often than this memorises it.
MOST_READINGS = 3

EXAMPLES = """\
  python scripts/heal.py window:size=64 --layers 8-21 --text book.txt
  python scripts/heal.py my_attention.py:window --text book.txt --steps 500 --out window.safetensors
  python scripts/lab.py window:size=64 --layers 8-21 --healed healed.safetensors
  torchrun --nproc-per-node 2 scripts/heal.py window:size=64 --text book.txt
  torchrun --nproc-per-node 2 scripts/heal.py window:size=64 --text book.txt --split fast

Ctrl-C ends after the running step and saves it; the same command resumes from
there."""


def main() -> int:
    """Heal, write the layers to a file, and print three perplexities."""
    args = parse()
    from tinyllama.lab.change import Change
    from tinyllama.lab.healed import Settings, load_healed
    from tinyllama.lab.kernel_file import load_kernel

    change = Change(args.kernel, load_kernel(args.kernel), args.layers, args.heads)
    ranks = options.join(args)
    start = load_healed(args.out) if args.out.exists() else None
    text = together.share(lambda: read_text(args.text))
    settings = Settings(
        kernel=args.kernel,
        layers=args.layers,
        heads=args.heads,
        text=hashlib.sha256(text.encode()).hexdigest()[:16],
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        seed=args.seed or 0,
    )
    if start is not None:
        check_same(args.out, start.settings, settings)
    model, tokenizer = options.load(args, whole=not options.shared(args))
    if model.sharing is not None:
        ranks = None  # they share the model, and not the windows
    ids = tokenizer.encode(text)
    cut = int(len(ids) * (1 - HELD_OUT))
    if len(ids) - cut < 2:
        raise InputError(f"text: expected 10 tokens or more, got {len(ids)}; give a longer text")
    readings = args.steps * args.batch * args.length / cut
    if readings > MOST_READINGS:
        note(f"warning: the text will be read {readings:.0f} times and memorised; give a longer one")
    healed, interrupted = train(args, model, change, ids[:cut], settings, start, ranks)
    outcome = measure(model, change, ids[cut:][: args.held_out], healed, settings)
    print(json.dumps(asdict(outcome), indent=1) if args.json else in_words(outcome))
    return 130 if interrupted else 0


def check_same(path: Path, there: Settings, settings: Settings) -> None:
    """Raise InputError if a file belongs to another experiment, before anything is computed or replaced."""
    for name, value in asdict(settings).items():
        then = getattr(there, name)
        if then != value:
            raise InputError(
                f"{path}: was trained with {name} {then}, expected {value}; give another --out or the same "
                "options"
            )


def train(
    args: argparse.Namespace,
    model: Llama,
    change: Change,
    ids: Sequence[int],
    settings: Settings,
    start: Healed | None,
    ranks: Ranks | None,
) -> tuple[Healed | None, bool]:
    """Heal until `--steps` steps are done in all, or Ctrl-C; returns the state and whether it was Ctrl-C."""
    from tinyllama.lab.healed import save_healed
    from tinyllama.lab.healing import heal, whole
    from tinyllama.parallel.ranks import without_echo

    stopped = False

    def stop(_signal: int, _frame: Any) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    def save(state: Healed) -> None:
        healed = whole(state, model)
        if ranks is not None:  # each has taken the steps
            ranks.same("trained weights", healed.digest)
        if together.rank() == 0:
            save_healed(args.out, healed)

    first = together.rank() == 0  # the others end when it does
    before = signal.signal(signal.SIGINT, without_echo(stop) if first else signal.SIG_IGN)
    healed, done = start, len(start.losses) if start else 0
    try:
        with step_progress(args.steps, done) as step:
            for healed in heal(model, change, ids, settings, args.steps, start, ranks):
                step(f"loss {healed.losses[-1]:.3f}")
                stopped = together.share(partial(bool, stopped))
                if stopped:
                    break
                if len(healed.losses) % args.save_every == 0:
                    save(healed)
    finally:
        signal.signal(signal.SIGINT, before)
    if healed is not None and len(healed.losses) > done:
        save(healed)
        note(f"wrote {args.out}, {len(healed.losses)} steps")
        healed = whole(healed, model)
    return healed, stopped


def measure(
    model: Llama, change: Change, ids: Sequence[int], healed: Healed | None, settings: Settings
) -> Outcome:
    """Perplexity of held-out text: unchanged, changed, healed."""
    from tinyllama.lab.healed import Outcome
    from tinyllama.lab.perplexity import perplexity, text_nll

    own = text_nll(model, ids, settings.length)

    def under(one: Change) -> Perplexity:
        with one.applied(model):
            return perplexity([text_nll(model, ids, settings.length)], [own])

    changed, after = under(change), None
    if healed is not None:
        after = under(replace(change, weights=healed.weights))
    return Outcome(settings, len(ids), changed, after, healed.losses if healed else ())


def in_words(outcome: Outcome) -> str:
    """The perplexities, a line for each."""
    from tinyllama.lab.tables import change, grouped

    changed, healed = outcome.changed, outcome.healed
    lines = [
        f"perplexity of {outcome.held_out} held-out tokens, beside the unchanged model:",
        f"  unchanged  {grouped(changed.before)}",
        f"  changed    {grouped(changed.after)}, {change(changed)}",
    ]
    if healed is not None:
        lines.append(f"  healed     {grouped(healed.after)}, {change(healed)}, {len(outcome.losses)} steps")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("kernel", metavar="KERNEL", help="a variant's name, or file.py:function")
    options.add_place_options(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="learn from this; - is stdin")
    parser.add_argument("--steps", type=options.count, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("healed.safetensors"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--save-every", type=options.positive, default=25, metavar="N", help="steps (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=options.positive, default=4, metavar="N", help="windows a step (default: %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=options.positive,
        default=256,
        metavar="N",
        help="tokens a window (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=options.positive,
        default=4096,
        metavar="N",
        help="tokens to measure on, of the last fifth (default: %(default)s)",
    )
    parser.add_argument(
        "--lr", type=float, default=1e-4, metavar="X", help="learning rate (default: %(default)s)"
    )
    parser.add_argument("--seed", type=options.seed, metavar="N", help="of the windows' places (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options.add_model_options(parser)
    options.add_rank_options(parser)
    args = parser.parse_args()
    options.check_output(parser, "--out", args.out)
    if not 0 < args.lr < 1:
        parser.error(f"--lr: expected a number between 0 and 1, got {args.lr}")
    return args


if __name__ == "__main__":
    run(main, ranks=True)
