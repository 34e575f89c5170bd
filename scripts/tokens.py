"""Take a text or a chat apart into tokens: id, piece, bytes, and who wrote it.

On a terminal this is a table. A pipe gets one line per token (position, id, piece,
bytes in hex and origin, separated by tabs), and then, for each other way to ids that
people take, a line beginning with # that says where its ids begin to differ. The
origin is special, template or text.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, astuple

from rich.table import Column, Table
from rich.text import Text

from tinyllama.checkpoints.hub import resolve
from tinyllama.cli import options, terminal
from tinyllama.progress import TableConsole, escape
from tinyllama.text.routes import TakenApart, take_apart
from tinyllama.text.tokenizer import Tokenizer

EXAMPLES = """\
  python scripts/tokens.py "Hello World!"
  python scripts/tokens.py --chat --system "Answer briefly." "What does </s> mean?"
  python scripts/tokens.py --model smollm2 --file letter.txt | cut -f 2
  echo "naïve 你好" | python scripts/tokens.py --json"""

STYLES = {"special": "magenta", "template": "cyan", "text": ""}


def main() -> None:
    """Print the tokens of the prompt, then the other routes."""
    args = parse()
    warnings.showwarning = options.note_warning
    tokenizer = Tokenizer.from_folder(resolve(args.model))
    found = take_apart(tokenizer, options.chat_messages(args) if args.chat else args.prompt)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
    elif sys.stdout.isatty():
        print_table(found)
    else:
        for row in found.tokens:
            print("\t".join(escape(str(value)) for value in astuple(row)))
        for route in found.routes:
            print(f"# {route}: {' '.join(map(str, route.ids))}")


def parse() -> argparse.Namespace:
    """The command line, with the prompt read."""
    parser = options.Parser(__doc__, EXAMPLES)
    options.add_prompt_options(parser, "take apart")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_model_name(parser)
    args = parser.parse_args()
    args.prompt = options.read_prompt(parser, args)
    return args


def print_table(found: TakenApart) -> None:
    """The tokens as a table and the other routes below it, for a terminal."""
    numbers = (Column(name, justify="right") for name in ("position", "id"))
    table = Table(*numbers, "piece", "bytes", "origin")
    for row in found.tokens:
        # Text objects: in a plain string, rich would read [brackets] as markup.
        table.add_row(*(Text(escape(str(value))) for value in astuple(row)), style=STYLES[row.origin])
    console = TableConsole()
    console.print(table)
    for route in found.routes:
        console.print(Text(str(route), style="bold"))
        console.print(Text(" ".join(map(str, route.ids))))


if __name__ == "__main__":
    terminal.run(main)
