"""Watch a model compute: code line by line, attention, positions, residual stream, decoding, what-ifs.

Opens a page in the browser, served to this machine alone, and prints its address; Ctrl-C ends it. --html
writes one file instead, which opens offline and can be shared.
"""

from __future__ import annotations

import argparse
import os
import secrets
import warnings
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.cli import options, terminal
from tinyllama.progress import note, progress_line

if TYPE_CHECKING:
    from tinyllama.explorer.session import Session

EXAMPLES = """\
  python scripts/explore.py "The capital of France is"
  python scripts/explore.py "..." --model smollm2 --attention my_attention.py:window --layers 8-21
  python scripts/explore.py --chat "Why is the sky blue?" --model smollm2
  python scripts/explore.py --html capital.html "The capital of France is"
  python scripts/explore.py --text "The capital of France is"        in the terminal"""


def main() -> int:
    """Record the prompt, and show it."""
    args = parse()
    warnings.showwarning = options.note_warning
    kernel, args.attention = args.attention, "sdpa"
    from tinyllama.lab.kernel_file import BUILT_IN, load_kernel

    kernels = BUILT_IN | {kernel: load_kernel(kernel)}
    model, tokenizer = options.load(args, args.weights)
    model.set_attention(kernels[kernel], args.layers, args.heads)

    import tinyllama.explorer.page
    from tinyllama.explorer.session import Session

    ids = tokenizer.chat(options.chat_messages(args)) if args.chat else tokenizer.encode(args.prompt)
    with progress_line() as done:
        done("reading the text")
        session = Session(model, tokenizer, ids, tokenizer.name, kernels)
    if args.text:
        from tinyllama.explorer.terminal import show

        show(session)
    elif args.html is not None:
        tinyllama.explorer.page.save(session, args.html)
        note(f"wrote {args.html}")
    else:
        serve(session, args.port, args.browser)
    return 0


def parse() -> argparse.Namespace:
    """The command line, with the prompt read."""
    parser = options.Parser(__doc__, EXAMPLES)
    options.add_prompt_options(parser, "explore")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page to a file, and end")
    parser.add_argument("--text", action="store_true", help="print what the terminal can show, and end")
    parser.add_argument(
        "--port", type=options.integers(0, 65535), default=0, metavar="N", help="0: any free one"
    )
    parser.add_argument(
        "--no-browser", dest="browser", action="store_false", help="print the address, open nothing"
    )
    options.add_place_options(parser)
    options.add_model_options(parser)
    options.add_weights_option(parser)
    args = parser.parse_args()
    options.check_output(parser, "--html", args.html)
    args.prompt = options.read_prompt(parser, args)
    return args


def serve(session: Session, port: int, browser: bool) -> None:
    """Answer the page until Ctrl-C."""
    import uvicorn

    from tinyllama.explorer.server import application, listen

    listener = listen(port)
    host, token = f"127.0.0.1:{listener.getsockname()[1]}", secrets.token_urlsafe(24)
    address = f"http://{host}/{token}/"
    note(address)
    note("Ctrl-C ends it")
    if browser and "SSH_CONNECTION" not in os.environ:
        webbrowser.open(address)
    settings: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
    settings["timeout_graceful_shutdown"] = 1  # a browser keeps its connection open
    server = uvicorn.Server(uvicorn.Config(application(session, token, host), **settings))
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    note("ended")


if __name__ == "__main__":
    terminal.run(main)
