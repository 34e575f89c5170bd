"""Take a text or a chat apart into tokens: id, piece, bytes, and who wrote it.

On a terminal this is a table. A pipe gets one line per token (position, id, piece, bytes in hex and origin,
separated by tabs), then a line beginning with # for every other way to ids that people take, saying where its
ids begin to differ. The origin is special, template or text.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from itertools import zip_longest
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.checkpoints.hub import resolve
from tinyllama.cli import options, terminal
from tinyllama.progress import escape
from tinyllama.text.tokenizer import Token, Tokenizer

EXAMPLES = """\
  python scripts/tokens.py "Hello World!"
  python scripts/tokens.py --chat --system "Answer briefly." "What does </s> mean?"
  python scripts/tokens.py --model smollm2 --file letter.txt | cut -f 2
  echo "naïve 你好" | python scripts/tokens.py --json"""


class Route(NamedTuple):
    """Another way to ids, and the first position where they differ from the prompt's (None: nowhere)."""

    name: str
    ids: list[int]
    first_difference: int | None


def main() -> None:
    """Print the tokens of the prompt, then the other routes."""
    args = parse()
    warnings.showwarning = options.note_warning
    prompt = options.read_prompt(args)
    tokenizer = Tokenizer.from_folder(resolve(args.model))
    if args.chat:
        text, tokens, routes = take_chat_apart(tokenizer, options.chat_messages(args, prompt))
    else:
        text, tokens, routes = take_text_apart(tokenizer, prompt)
    rows = [
        {
            "position": position,
            "id": token.id,
            "piece": tokenizer.piece(token.id),
            "bytes": tokenizer.token_bytes(token.id).hex(" "),
            "origin": token.origin,
        }
        for position, token in enumerate(tokens)
    ]
    if args.json:
        routes_as_dicts = [route._asdict() for route in routes]
        print(json.dumps({"text": text, "tokens": rows, "routes": routes_as_dicts}, indent=1))
    elif sys.stdout.isatty():
        print_table(rows, routes)
    else:
        print_lines(rows, routes)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(__doc__, EXAMPLES)
    options.add_prompt_options(parser, "take apart")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_model_name(parser)
    args = parser.parse_args()
    options.check_prompt(parser, args)
    return args


def take_text_apart(tokenizer: Tokenizer, text: str) -> tuple[str, list[Token], list[Route]]:
    """A text, its tokens, and the ids that it has without BOS."""
    tokens = tokenizer.tokens(text)
    return text, tokens, [route("without BOS", tokenizer.encode(text, bos=False), tokens)]


def take_chat_apart(
    tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> tuple[str, list[Token], list[Route]]:
    """A chat's rendered text, its tokens, and the ids that it has by way of a text."""
    segments = tokenizer.chat_segments(messages)
    text = "".join(segment.text for segment in segments)
    tokens = tokenizer.encode_segments(segments)
    decoded = tokenizer.decode(token.id for token in tokens)
    return (
        text,
        tokens,
        [
            route("rendered, then encoded", tokenizer.encode(text), tokens),
            route("rendered, then encoded without BOS", tokenizer.encode(text, bos=False), tokens),
            route("decoded, then encoded again", tokenizer.encode(decoded), tokens),
        ],
    )


def route(name: str, ids: list[int], tokens: list[Token]) -> Route:
    """A route whose ids are compared with the prompt's."""
    pairs = zip_longest(ids, (token.id for token in tokens))
    return Route(name, ids, next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None))


def describe(route: Route) -> str:
    """A route's difference in words."""
    where = "the same ids" if route.first_difference is None else f"differs from {route.first_difference} on"
    return f"{route.name}: {where}"


def print_table(rows: list[dict[str, Any]], routes: list[Route]) -> None:
    """The tokens as a table and the other routes below it, for a terminal."""
    table = Table(title_justify="left")
    for column in ("position", "id"):
        table.add_column(column, justify="right")
    for column in ("piece", "bytes", "origin"):
        table.add_column(column)
    styles = {"special": "magenta", "template": "cyan", "text": ""}
    for row in rows:
        # Text objects: in a plain string, rich would read [brackets] as markup.
        cells = [Text(escape(str(value))) for value in row.values()]
        table.add_row(*cells, style=styles[row["origin"]])
    console = Console(highlight=False)
    console.print(table)
    for other in routes:
        console.print(Text(describe(other), style="bold"))
        console.print(Text(" ".join(map(str, other.ids))))


def print_lines(rows: list[dict[str, Any]], routes: list[Route]) -> None:
    """The tokens as lines that can be piped."""
    for row in rows:
        print("\t".join(escape(str(value)) for value in row.values()))
    for other in routes:
        print(f"# {describe(other)}: {' '.join(map(str, other.ids))}")


if __name__ == "__main__":
    terminal.run(main)
