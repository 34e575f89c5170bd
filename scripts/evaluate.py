"""Score a model on the benchmarks that papers report, with its own attention and with another.

Asks what lm-evaluation-harness asks. The changed model's answers stand beside
the unchanged one's, document by document, so that a small difference can be
told from chance. The toy tasks need no network; others read the Hugging Face
Hub.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli import options, together
from tinyllama.cli.terminal import refuse, run
from tinyllama.progress import TableConsole, note

if TYPE_CHECKING:
    from tinyllama import Llama, Tokenizer
    from tinyllama.evaluation.paired import Interval, Score
    from tinyllama.evaluation.tasks import Loaded
    from tinyllama.lab.change import Change

# What a kernel must keep, or likelihoods and texts mean nothing.
CLAUSES = ("shape", "causal", "cache", "chunks", "batch", "padding")

EXAMPLES = """\
  python scripts/evaluate.py --tasks toy_choice,toy_cloze --model smollm2
  python scripts/evaluate.py --tasks hellaswag,arc_easy,wikitext --attention window:size=256 --layers 8-21
  python scripts/evaluate.py --tasks gsm8k --chat --limit 100 --batch 8 --json > gsm8k.json
  python scripts/evaluate.py --list

exit status: 0, 1 if the kernel breaks the contract or a model gives NaN, 2 on bad input"""


def main() -> int:
    """Print every task's scores; 1 if there are none, because a kernel or a model is broken."""
    # Python puts this folder first on the path, and the harness imports a package that is called evaluate.
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    args = parse()
    warnings.showwarning = options.note_warning
    from tinyllama.evaluation.tasks import loaded, toys

    if args.list:
        for name, task in toys().items():
            print(f"{name:<16} {task['metadata']['about']}")
        print("and those that `lm-eval ls tasks` lists, whose documents are on the Hub")
        return 0
    from tinyllama.lab.change import Change
    from tinyllama.lab.kernel_file import load_kernel
    from tinyllama.sampler import NonFiniteLogitsError

    change = None
    if args.attention != args.against:
        change = Change(args.attention, load_kernel(args.attention), args.layers, args.heads)
        if not keeps_contract(change):
            return 1
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what its own examples do
    with loaded(args.tasks, args.fewshot) as tasks:  # refused before a model is loaded
        args.attention = args.against
        model, tokenizer = options.load(args)
        try:
            found = measure(model, tokenizer, tasks, change, args)
        except NonFiniteLogitsError as error:
            refuse(str(error))
            return 1
    if args.json:
        about = {"command": together.command("evaluate")}
        print(json.dumps(about | {"scores": [asdict(score) for score in found]}, indent=1))
    else:
        show(found, args, change)
    return 0


def keeps_contract(change: Change) -> bool:
    """Check the clauses that scores rest on, and say which are broken."""
    from tinyllama.lab import check_attention
    from tinyllama.lab.clauses import broken_clauses

    contract = check_attention(change.kernel, clauses=CLAUSES)
    if not contract.passed:
        print(contract)
    elif "causal" in broken_clauses(change.kernel):
        note(f"warning: {change.name} sees later tokens, as declared: its likelihoods look too good")
    return contract.passed


def measure(
    model: Llama, tokenizer: Tokenizer, tasks: Loaded, change: Change | None, args: argparse.Namespace
) -> list[Score]:
    """Run the tasks with the unchanged model, then with the changed one."""
    from tinyllama.evaluation.harness import HarnessModel
    from tinyllama.evaluation.paired import run as run_tasks
    from tinyllama.evaluation.paired import scores

    results = []
    if change is not None:
        with change.applied(model):  # refuses an unknown layer or head before anything is measured
            pass
    for name, one in {"unchanged": None, "changed": change}.items():
        if name == "changed" and change is None:
            break
        note(f"{name}:")
        with one.applied(model) if one is not None else nullcontext():
            lm = HarnessModel(model, tokenizer, args.batch)
            results.append(run_tasks(lm, tasks, args.limit, args.chat))
    return scores(tasks, *results)


def show(found: list[Score], args: argparse.Namespace, change: Change | None) -> None:
    """A row for each metric."""
    from rich.table import Column, Table

    from tinyllama.lab.tables import grouped

    def right(*heads: str) -> list[Column]:
        return [Column(head, justify="right", no_wrap=True) for head in heads]

    columns = (
        right("N", "value", "95%") if change is None else right("N", "unchanged", "changed", "change", "95%")
    )
    # The one column that may fold: a number that is cut short would mislead.
    table = Table(Column("task", overflow="fold", min_width=10), Column("metric", no_wrap=True), *columns)
    table.header_style, table.box, table.padding = "underline", None, (0, 1, 0, 0)
    for score in found:
        metric = score.metric + (" ↓" if score.higher_is_better is False else "")
        documents = "" if score.documents is None else str(score.documents)
        if score.changed is None or score.difference is None:
            values = [grouped(score.unchanged), ends(score.unchanged_interval, grouped)]
        else:
            values = [grouped(score.unchanged), grouped(score.changed), signed(score.difference)]
            values.append(ends(score.difference_interval, signed))
        table.add_row(score.task, metric, documents, *values)
    own = f"attention: {args.against}"
    print(own if change is None else f"{own}; changed: {change.name}{place(args)}")
    TableConsole().print(table)


def place(args: argparse.Namespace) -> str:
    """Where the changed attention is, in words."""
    from tinyllama.ranges import ranges

    parts = {"layers": args.layers, "heads": args.heads}
    return "".join(f", {name} {ranges(numbers)}" for name, numbers in parts.items() if numbers)


def signed(value: float) -> str:
    """A difference: +0.025, -31.2, +3,069, and from a million on +2.1e+07."""
    if abs(value) >= 1e6:
        return f"{value:+.1e}"
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:+,.{digits}f}"  # no -0.000


def ends(interval: Interval | None, write: Callable[[float], str]) -> str:
    """An interval in a table."""
    return "" if interval is None else f"{write(interval.low)} to {write(interval.high)}"


def names(text: str) -> list[str]:
    """The names in a list such as `arc_easy,wikitext`, for `type=`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("--tasks", type=names, metavar="TASK,...", help="what to score")
    options.add_place_options(parser)
    parser.add_argument(
        "--against",
        default="sdpa",
        metavar="KERNEL",
        help="the unchanged model's attention; for weights trained with another, that (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=options.positive,
        metavar="N",
        help="the first N documents of each task (default: all)",
    )
    parser.add_argument(
        "--fewshot", type=options.count, metavar="N", help="examples before each (default: as the task says)"
    )
    parser.add_argument(
        "--batch", type=options.positive, default=1, metavar="N", help="texts at once (default: %(default)s)"
    )
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    parser.add_argument("--list", action="store_true", help="list the tasks that need no network")
    parser.add_argument("--json", action="store_true", help="print all scores as JSON, with each document's")
    options.add_model_options(parser)
    args = parser.parse_args()
    if not (args.tasks or args.list):
        parser.error("no task: give --tasks, or --list for those that need no network")
    if (args.layers or args.heads) and args.attention == args.against:
        parser.error("--layers and --heads need another attention: give --attention")
    return args


if __name__ == "__main__":
    run(main)
