"""Talk with a model. The KV cache stays from turn to turn, so only new tokens are computed.

Ctrl-C stops a reply, and what was said of it stays; at the prompt, twice, it leaves.
Piped in, every line is a message or a command, and stdout gets the replies alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
/reset        start anew; the system message stays
/system TEXT  set the system message, or remove it without TEXT; it holds for the whole conversation
/save FILE    write the messages as JSON; /save! FILE overwrites a file
/load FILE    go on with messages that were saved
/stats        what the latest reply took
/exit         leave, like Ctrl-D
A message that begins with / needs a space before it."""

HISTORY_LINES = 1000


def main() -> int:
    """Read a line, answer it, until the input ends."""
    args = parse()
    warnings.showwarning = options.note_warning
    settings = options.sampling(args)
    model, tokenizer = options.load(args, args.weights)
    # A model without a chat template is refused now, not at the first message.
    tokenizer.chat([{"role": "user", "content": "Hello"}])

    from tinyllama.text.conversation import Conversation

    conversation = Conversation(model, tokenizer, system(args.system), strict=args.strict_chat)
    context = model.config.max_position_embeddings
    if terminal.piped():
        for line in piped_lines():
            if not respond(conversation, line, settings, context):
                break
        return 0
    note(f"a context of {context} tokens; /help lists the commands, Ctrl-D leaves")
    with line_history():
        converse(conversation, settings, context)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--strict-chat", action="store_true", help="refuse role markers in a message")
    options.add_sampling_options(parser)
    options.add_model_options(parser)
    options.add_weights_option(parser)
    return parser.parse_args()


def converse(conversation: Conversation, settings: dict[str, Any], context: int) -> None:
    """The conversation at a terminal, where an error or a Ctrl-C ends a turn only."""
    warned = False
    while True:
        try:
            line = typed_line()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            if warned:
                raise
            note("Ctrl-C once more leaves")
            warned = True
            continue
        except UnicodeDecodeError:
            note("error: that line is not UTF-8; set the terminal to UTF-8")
            continue
        warned = False
        try:
            if not respond(conversation, line, settings, context):
                return
        except InputError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("stopped; what was said is kept")


def typed_line() -> str:
    """A line from the terminal; the prompt never goes into a file that stdout is sent to."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def piped_lines() -> Iterator[str]:
    """The lines of stdin."""
    offset = 0
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            at, value = offset + error.start, line[error.start]
            raise InputError(f"stdin: byte {at} (0x{value:02x}) is not UTF-8; convert the text") from error
        offset += len(line)


def respond(conversation: Conversation, line: str, settings: dict[str, Any], context: int) -> bool:
    """Answer a message or obey a command; False means to leave."""
    if not line.strip():
        return True
    if line.startswith("/"):
        return obey(conversation, line, context)
    try:
        conversation.ask(line, terminal.write, **settings)
    finally:
        terminal.write("\n")
    turn = conversation.last
    if turn and turn.prompt + turn.new == context:
        note(f"the context of {context} tokens is full; /reset starts anew")
    return True


def obey(conversation: Conversation, line: str, context: int) -> bool:
    """Carry out a command; False means to leave."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/exit":
        return False
    if command == "/help":
        for row in COMMANDS.splitlines():
            note(row)
    elif command == "/reset":
        conversation.messages = [m for m in conversation.messages if m["role"] == "system"]
    elif command == "/system":
        others = [m for m in conversation.messages if m["role"] != "system"]
        conversation.messages = system(argument or None) + others
    elif command in ("/save", "/save!"):
        save(conversation.messages, argument, overwrite=command == "/save!")
    elif command == "/load":
        conversation.messages = load(argument)
        note(f"{len(conversation.messages)} messages; the model reads them with your next one")
    elif command == "/stats":
        show_stats(conversation, context)
    else:
        raise InputError(f"{command}: no such command; /help lists them")
    return True


def system(text: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if text is None else [{"role": "system", "content": text}]


def save(messages: list[dict[str, Any]], name: str, overwrite: bool) -> None:
    """Write the messages as JSON: the whole file or none of it."""
    if not name:
        raise InputError("/save: expected a file name; /save FILE")
    path = Path(name).expanduser()
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; /save! overwrites it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}; give another file") from error
    note(f"{len(messages)} messages are in {path}")


def load(name: str) -> list[dict[str, str]]:
    """The messages that `save` wrote."""
    if not name:
        raise InputError("/load: expected a file name; /load FILE")
    path = Path(name).expanduser()
    text = terminal.read_text(str(path))
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); give a file that /save wrote") from error
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise InputError(f"{path}: expected a list of objects with role and content; give a saved file")
    return messages


def is_message(value: object) -> bool:
    """Whether a JSON value is a message as `save` writes them."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def show_stats(conversation: Conversation, context: int) -> None:
    """What the latest reply took, to stderr."""
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
    note(f"context  {turn.prompt + turn.new} of {context} tokens")


@contextmanager
def line_history() -> Iterator[None]:
    """Line editing, with the lines of earlier chats on the up arrow where the state folder can be used."""
    import readline  # lets input() edit lines

    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "tinyllama" / "chat_history"
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            readline.write_history_file(file)


if __name__ == "__main__":
    terminal.run(main)
