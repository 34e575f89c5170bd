"""Continue a text, or answer one message, printing the words as they come.

The prompt is the argument, the content of --file, or what is piped in. A newline
at the very end of a file or a pipe is left out, and one is added after the text, so
that an output can be used as a prompt. An empty prompt stands for BOS.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import warnings

import tinyllama
from tinyllama.cli import options, terminal, together
from tinyllama.progress import note

EXAMPLES = """\
  python scripts/generate.py "Greetings!" --max-new-tokens 30
  python scripts/generate.py --model smollm2 --chat "What is the capital of France?"
  python scripts/generate.py --temperature 0.7 --top-k 50 --top-p 0.9 --seed 42 "Once upon a time"
  python scripts/generate.py --file letter.txt --stop "Yours sincerely" --stats
  echo "Greetings!" | python scripts/generate.py | head -c 80
  torchrun --nproc-per-node 2 scripts/generate.py --model smollm2 "Greetings!"    on two processes"""


def main() -> int:
    """Print the prompt and its continuation, or under --chat the reply alone."""
    args = parse()
    warnings.showwarning = options.note_warning
    settings = options.sampling(args)
    if settings["temperature"] and settings["seed"] is None:
        settings["seed"] = secrets.randbits(32)  # --stats shows it, so that the run can be repeated

    start = time.perf_counter()
    model, tokenizer = options.load(args, args.weights, args.graph)
    load_seconds = time.perf_counter() - start

    ids = together.share(lambda: prompt_ids(args, tokenizer))
    tokens = tinyllama.stream(model, ids, **settings)
    reply = tinyllama.TextReply(tokens, tokenizer, ids, args.stop)
    problem = None
    try:
        if not args.chat:
            terminal.write(args.prompt)
        for piece in reply:
            terminal.write(piece)
    except tinyllama.NonFiniteLogitsError as error:
        problem = str(error)
    finally:
        terminal.write(reply.rest() + "\n")

    if reply.unknown:
        note(f"the tokenizer has no text for some of the ids: {', '.join(map(str, reply.unknown[:5]))}")
    old, new, context = len(ids), len(reply.ids), model.config.context
    if old + new == context and reply.reason == "length":
        note(f"stopped: the context of {context} tokens is full")
    if tokenizer.chat_template and not args.chat and sys.stderr is not None and sys.stderr.isatty():
        note("this is a chat model, which continued the text; with --chat it answers it")
    if args.stats:
        import torch

        note(f"load     {load_seconds:.1f} s")
        note(f"threads  {torch.get_num_threads()}")
        note(f"prompt   {old} tokens, {options.rate(old, sum(tokens.seconds[:1]))}")
        note(f"new      {new} tokens, {options.rate(new - 1, sum(tokens.seconds[1:]))}")
        if tokens.speculation:
            note(f"guesses  {tokens.speculation}")
        note(f"memory   {peak_memory(args.device)}")
        if ranks := together.join(on_gpus=False):
            note(f"ranks    {ranks}")
        note(f"seed     {settings['seed'] if settings['temperature'] else 'none: greedy'}")
        note(f"ended by {problem or reply.reason}")
    if problem:
        note(f"error: {problem}")
    return 1 if problem else 0


def parse() -> argparse.Namespace:
    """The command line, with the prompt read."""
    parser = options.Parser(__doc__, EXAMPLES)
    options.add_prompt_options(parser, "continue")
    parser.add_argument("--strict-chat", action="store_true", help="refuse role markers in a message")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; can be repeated"
    )
    parser.add_argument(
        "--stats", action="store_true", help="print times, threads, memory and the seed to stderr"
    )
    options.add_sampling_options(parser)
    options.add_model_options(parser)
    options.add_speed_options(parser)
    options.add_rank_options(parser)
    args = parser.parse_args()
    if args.strict_chat and not args.chat:
        parser.error("--strict-chat needs --chat")
    args.prompt = options.read_prompt(parser, args)
    return args


def prompt_ids(args: argparse.Namespace, tokenizer: tinyllama.Tokenizer) -> list[int]:
    """The ids that the model continues."""
    if args.chat:
        if not args.prompt.strip():
            raise tinyllama.InputError("chat: expected a message, got an empty prompt; give it some text")
        return tokenizer.chat(options.chat_messages(args), strict=args.strict_chat)
    ids = tokenizer.encode(args.prompt)
    if ids:
        return ids
    if tokenizer.bos_id is None:
        raise tinyllama.InputError("prompt: empty, and this model has no BOS to start from; give some text")
    return [tokenizer.bos_id]


def peak_memory(device: str) -> str:
    """The most memory that was in use at once, in words."""
    import torch

    try:
        import resource

        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:,.0f} MB at most"
    except ImportError:
        text = "not known on this system"
    if torch.device(device).type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB of {device}"
    return text


if __name__ == "__main__":
    terminal.run(main, ranks=True)
