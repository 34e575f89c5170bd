"""Take a text or a chat apart into tokens: id, piece, bytes, who wrote it, and its characters.

On a terminal this is a table. A pipe gets one line per token (position, id, piece,
bytes in hex, origin and characters, separated by tabs), and then, for each other way
to ids that people take, a line beginning with # that says where its ids begin to
differ. The origin is special, template or text. A character of several tokens stands
with the first of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, astuple

from tinyllama.checkpoints.hub import resolve
from tinyllama.cli import options, terminal
from tinyllama.progress import TableConsole, escape
from tinyllama.text.tokenizer import Tokenizer

EXAMPLES = """\
  python scripts/tokens.py "Hello World!"
  python scripts/tokens.py --chat --system "Answer briefly." "What does </s> mean?"
  python scripts/tokens.py --model smollm2 --file letter.txt | cut -f 2
  echo "naïve 你好" | python scripts/tokens.py --json"""


def main() -> None:
    """Print the tokens of the prompt, then the other routes."""
    args = parse()
    warnings.showwarning = options.note_warning
    tokenizer = Tokenizer.from_folder(resolve(args.model))
    found = tokenizer.explain(options.chat_messages(args) if args.chat else args.prompt)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
    elif sys.stdout.isatty():
        found.show(TableConsole())
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


if __name__ == "__main__":
    terminal.run(main)
