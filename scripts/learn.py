"""Build your own Llama: ten functions, from token ids to the next token, judged one by one.

`start` writes a file with the functions to fill in. `check` says which are right, names the mistake in the
others where it is a well-known one, and puts the right ones into a trained model, which then writes. `hint`
shows one more hint each time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyllama.cli import options, terminal
from tinyllama.progress import note, progress_line

EXAMPLES = """\
  python scripts/learn.py start my_llama.py
  python scripts/learn.py check my_llama.py              all that is written
  python scripts/learn.py check my_llama.py rope         one function
  python scripts/learn.py hint my_llama.py rope"""


def main() -> int:
    """Do what is asked; 1 if a function is wrong."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("action", choices=["start", "check", "hint"])
    parser.add_argument("file", type=Path, metavar="FILE", help="yours, such as my_llama.py")
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help="one function or several (check: default all)"
    )
    options.add_model_name(parser)
    args = parser.parse_args()
    if args.action == "hint" and len(args.steps) != 1:
        parser.error("hint: name one function, as in: hint my_llama.py rope")
    if args.action == "start" and args.steps:
        parser.error("start takes a file alone")
    return {"start": start, "check": check, "hint": hint}[args.action](args)


def start(args: argparse.Namespace) -> int:
    """Write the skeleton."""
    from tinyllama.learn.course import start

    start(args.file)
    note(f"wrote {args.file}: fill in a function, then: python scripts/learn.py check {args.file}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Judge the file's functions, and note in its progress file which are right."""
    import tinyllama
    from tinyllama.learn.course import Progress, read
    from tinyllama.learn.judge import STEPS
    from tinyllama.learn.tutor import check

    functions = read(args.file)
    steps = args.steps or list(functions)
    missing = [step for step in steps if step not in functions]
    if missing:
        raise tinyllama.InputError(
            f"{args.file}: has no function {missing[0]!r:.40}; it has {', '.join(functions)}"
        )
    with progress_line() as done:
        model = tokenizer = None
        if args.model is not None:
            done("loading")
            model, tokenizer = tinyllama.load(args.model, device="cpu", dtype="float32", weights="exact")
        chosen = {step: functions[step] for step in steps}
        report = check(chosen, model=model, tokenizer=tokenizer, done=done)
    print(report)
    progress = Progress.of(args.file)
    lost = [one.step for one in report.verdicts if one.step in progress.right and not one.right]
    if lost:
        print(f"\nright at the last check, and not now: {', '.join(lost)}")
    progress.right = sorted({*progress.right, *report.right} - set(lost))
    progress.save(args.file)
    print(f"\n{len(progress.right)} of {len(STEPS)} are right")
    return int(any(one.status == "wrong" for one in report.verdicts))


def hint(args: argparse.Namespace) -> int:
    """Show the hints so far and one more."""
    from tinyllama.learn.course import hint
    from tinyllama.learn.hints import HINTS

    step = args.steps[0]
    shown = hint(args.file, step)
    for number, line in enumerate(shown, 1):
        print(f"{number}. {line}")
    left = len(HINTS[step]) - len(shown)
    print(f"({left} more: ask again)" if left else "(that is the formula, and the last hint)")
    return 0


if __name__ == "__main__":
    terminal.run(main)
