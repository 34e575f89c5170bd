"""Talk with a model. The KV cache stays from turn to turn, so only new tokens are computed.

Ctrl-C stops a reply and keeps what was said so far; at the prompt, twice, it leaves.
If stdin is a pipe, every line is a message or a command, and stdout gets only the replies.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinyllama
from tinyllama.cli import options, terminal
from tinyllama.errors import InputError
from tinyllama.progress import note

if TYPE_CHECKING:
    from tinyllama.text.conversation import Conversation

EXAMPLES = """\
  python scripts/chat.py
  python scripts/chat.py --model smollm2 --system "Answer in one sentence."
  python scripts/chat.py --temperature 0.7 --top-k 50 --top-p 0.9
  printf 'My name is Ada.\\nWhat is my name?\\n' | python scripts/chat.py --model smollm2"""

COMMANDS = """\
/help         this list
/reset        start over; the system message stays
/system TEXT  set the system message, or remove it if there is no TEXT; it holds for the whole conversation
/save FILE    write the messages as JSON; /save! FILE overwrites a file
/load FILE    continue with messages that were saved
/stats        what the latest reply took
/exit         leave, like Ctrl-D
A message that begins with / needs a space before it."""

HISTORY_LINES = 1000


def main() -> int:
    """Read a line, answer it, until the input ends."""
    args = parse()
    warnings.showwarning = options.note_warning
    settings = options.sampling(args)
    model, tokenizer = options.load(args, args.weights, args.graph)
    # A model without a chat template is refused now, not at the first message.
    tokenizer.chat([{"role": "user", "content": "Hello"}])

    from tinyllama.text.conversation import Conversation

    conversation = Conversation(
        model, tokenizer, options.system_message(args.system), strict=args.strict_chat
    )
    if sys.stdin is None:
        raise InputError("stdin is closed; chat needs a terminal, or lines piped in")
    piped = terminal.piped()
    if not piped:
        note(f"a context of {conversation.context} tokens; /help lists the commands, Ctrl-D leaves")
        keep_history()
    for line in piped_lines() if piped else typed_lines():
        try:
            if not respond(conversation, line, settings):
                break
        except (InputError, KeyboardInterrupt) as problem:
            if piped:
                raise
            stopped = isinstance(problem, KeyboardInterrupt)
            note("stopped; what was said is kept" if stopped else f"error: {problem}")
        except tinyllama.NonFiniteLogitsError as problem:
            note(f"error: {problem}")
            return 1
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--strict-chat", action="store_true", help="refuse role markers in a message")
    options.add_sampling_options(parser)
    options.add_model_options(parser)
    options.add_speed_options(parser)
    return parser.parse_args()


def typed_lines() -> Iterator[str]:
    """The lines typed at a terminal; a second Ctrl-C in a row raises KeyboardInterrupt."""
    warned = False
    while True:
        try:
            # If stdout is a file, input() would write its prompt there.
            if not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            if warned:
                raise
            note("Ctrl-C once more leaves")
            warned = True
        except UnicodeDecodeError:
            note("error: that line is not UTF-8; set the terminal to UTF-8")
        else:
            warned = False
            yield line


def piped_lines() -> Iterator[str]:
    """The lines of stdin, each as soon as it is there."""
    offset = 0
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            at, value = offset + error.start, line[error.start]
            raise InputError(f"stdin: byte {at} (0x{value:02x}) is not UTF-8; convert the text") from error
        offset += len(line)


def respond(conversation: Conversation, line: str, settings: dict[str, Any]) -> bool:
    """Answer a message or obey a command; False means to leave."""
    if line.startswith("/"):
        return obey(conversation, line)
    if not line.strip():
        return True
    try:
        conversation.ask(line, terminal.write, **settings)
    finally:
        terminal.write("\n")
    turn = conversation.last
    if turn and turn.prompt + turn.new == conversation.context:
        note(f"the context of {conversation.context} tokens is full; /reset starts over")
    return True


def obey(conversation: Conversation, line: str) -> bool:
    """Carry out a command; False means to leave."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/save", "/save!", "/load") and not argument:
        raise InputError(f"{command}: expected a file name; {command} FILE")
    path = Path(os.path.expanduser(argument))
    if command == "/exit":
        return False
    if command == "/help":
        for row in COMMANDS.splitlines():
            note(row)
    elif command == "/reset":
        conversation.messages = [m for m in conversation.messages if m["role"] == "system"]
    elif command == "/system":
        others = [m for m in conversation.messages if m["role"] != "system"]
        conversation.messages = options.system_message(argument or None) + others
    elif command in ("/save", "/save!"):
        if command == "/save" and os.path.exists(path):  # False for a name that no file can have
            raise InputError(f"{path}: exists already; /save! overwrites it")
        conversation.save(path)
        note(f"{len(conversation.messages)} messages are in {path}")
    elif command == "/load":
        conversation.load(path)
        note(f"{len(conversation.messages)} messages; the model reads them with your next one")
    elif command == "/stats":
        show_stats(conversation)
    else:
        raise InputError(f"{command}: no such command; /help lists them")
    return True


def show_stats(conversation: Conversation) -> None:
    """Print to stderr what the latest reply took."""
    turn = conversation.last
    if turn is None:
        note("no reply yet")
        return
    computed = turn.prompt - turn.cached
    note(f"prompt   {turn.prompt} tokens, {turn.cached} of them in the cache already")
    note(f"prefill  {computed} tokens, {options.rate(computed, sum(turn.seconds[:1]))}")
    note(f"reply    {turn.new} tokens, {options.rate(turn.new - 1, sum(turn.seconds[1:]))}")
    if turn.speculation:
        note(f"guesses  {turn.speculation}")
    note(f"ended by {turn.reason or 'Ctrl-C'}")
    note(f"context  {turn.prompt + turn.new} of {conversation.context} tokens")


def keep_history() -> None:
    """Edit lines with readline, and keep them for the next chat if the state folder can be used."""
    try:
        import readline  # lets input() edit lines
    except ImportError:  # on Windows the console does
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "tinyllama" / "chat_history"
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(file)

    @atexit.register
    def write() -> None:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            readline.write_history_file(file)


if __name__ == "__main__":
    terminal.run(main)
