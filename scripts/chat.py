"""Talk with a model. The KV cache stays from turn to turn, so only new tokens are computed.

A pasted text of several lines is one message; Alt-Enter begins a new line. Ctrl-C stops a reply and keeps
what was said so far; at the prompt, twice, it leaves.
If stdin is a pipe, every line is a message or a command, and stdout gets only the replies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinyllama
from tinyllama.advice import did_you_mean
from tinyllama.cli import options, terminal, together
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
/retry        another reply to your last message; the same one, if it is greedy or has a seed
/undo         forget your last message and its reply
/set          how tokens are chosen; /set temperature 0.7 changes it, and so on for the others
/reset        start over; the system message stays
/system TEXT  set the system message, or remove it if there is no TEXT; it holds for the whole conversation
/save FILE    write the messages as JSON; /save! FILE overwrites a file
/load FILE    continue with messages that were saved
/stats        what the latest reply took
/exit         leave, like Ctrl-D
A message that begins with / needs a space before it. Alt-Enter begins a new line."""


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
        note(f"{tokenizer.name}, weights {args.weights}, a context of {conversation.context} tokens")
        note(f"{in_words(settings)}; /help lists the commands, Ctrl-D leaves")
    for line in together.shared(piped_lines() if piped else typed_lines()):
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
    options.add_rank_options(parser)
    return parser.parse_args()


def typed_lines() -> Iterator[str]:
    """What is typed at a terminal."""
    from tinyllama.cli.chat_terminal import typed_messages

    return typed_messages([line.split()[0] for line in COMMANDS.splitlines() if line.startswith("/")])


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
        return obey(conversation, line, settings)
    if line.strip():
        answer(conversation, line, settings)
    return True


def answer(conversation: Conversation, text: str, settings: dict[str, Any]) -> None:
    """Send a message and write the reply: wrapped and set off at a terminal, as it is elsewhere."""
    from tinyllama.cli.chat_terminal import Wrapped

    at_terminal = sys.stdout.isatty()
    show = Wrapped(terminal.write, shutil.get_terminal_size().columns)
    if at_terminal:
        terminal.write("\n")
    try:
        conversation.ask(text, show if at_terminal else terminal.write, **settings)
    finally:
        show.flush()
        terminal.write("\n\n" if at_terminal else "\n")
    turn = conversation.last
    if turn and turn.prompt + turn.new == conversation.context:
        note(f"the context of {conversation.context} tokens is full; /reset starts over")


def retry(conversation: Conversation, settings: dict[str, Any]) -> None:
    """Answer the last message once more; if nothing comes of it, the old reply stays."""
    before = conversation.messages
    try:
        answer(conversation, conversation.undo(), settings)
    finally:
        if len(conversation.messages) < len(before):
            conversation.messages = before


def obey(conversation: Conversation, line: str, settings: dict[str, Any]) -> bool:
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
    elif command == "/retry":
        retry(conversation, settings)
    elif command == "/undo":
        conversation.undo()
        note("forgotten")
    elif command == "/set":
        change(settings, *argument.split(maxsplit=1))
        note(in_words(settings))
    elif command == "/reset":
        conversation.messages = [m for m in conversation.messages if m["role"] == "system"]
    elif command == "/system":
        others = [m for m in conversation.messages if m["role"] != "system"]
        conversation.messages = options.system_message(argument or None) + others
    elif command in ("/save", "/save!") and together.rank() > 0:
        pass  # rank 0 writes
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


def change(settings: dict[str, Any], name: str = "", value: str = "") -> None:
    """Change one setting, if one is named; nothing changes unless the value can be used."""
    if not name:
        return
    name = name.replace("-", "_")
    if name not in settings:
        meant = did_you_mean(name, settings)
        raise InputError(f"/set: expected {', '.join(settings)}, got {name!r:.40}{meant}")
    kind = float if name in ("temperature", "top_p", "repetition_penalty") else int
    try:
        new = None if (name, value) == ("seed", "none") else kind(value)
    except ValueError as error:
        wanted = "a number" if kind is float else "a whole number"
        raise InputError(f"/set {name}: expected {wanted}, got {value!r:.40}") from error
    if kind is int and new is not None and not 0 <= new < 2**64:
        raise InputError(f"/set {name}: expected 0 to 2^64 - 1, got {value}")
    changed = settings | {name: new}
    tinyllama.Sampler(
        **{key: changed[key] for key in vars(tinyllama.Sampler())}
    )  # refuses what it cannot use
    settings[name] = new


def in_words(settings: dict[str, Any]) -> str:
    """The settings in one line, those that do nothing left out."""
    idle = {**vars(tinyllama.Sampler()), "speculate": 0}
    del idle["temperature"]  # 0 is greedy, which is worth saying
    return ", ".join(f"{name} {value}" for name, value in settings.items() if idle.get(name, ...) != value)


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


if __name__ == "__main__":
    terminal.run(main, ranks=True)
