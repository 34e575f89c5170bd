"""What several scripts' command lines share; importing it takes no torch, so that `--help` is instant."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tinyllama
from tinyllama.cli.terminal import piped, read_text
from tinyllama.progress import escape, note

if TYPE_CHECKING:
    from tinyllama import Llama, Tokenizer


class Parser(argparse.ArgumentParser):
    """An argument parser that shows examples and reports a bad option in one line, with exit status 2."""

    def __init__(self, description: str | None, examples: str) -> None:
        super().__init__(
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with the one line."""
        self.exit(2, f"error: {escape(message)}; see --help\n")


def add_prompt_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Where the prompt comes from, and whether it is a chat; see `check_prompt` and `read_prompt`."""
    parser.add_argument("prompt", nargs="?", help=f"the text to {purpose}; under --chat, the user's message")
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a file; - is stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system message of the chat")


def check_prompt(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 unless there is exactly one prompt, before a model is loaded for it."""
    if args.prompt is not None and args.file is not None:
        parser.error("give the prompt as an argument or by --file, not both")
    if args.prompt is None and args.file is None and not piped():
        parser.error("no prompt: give one as an argument, by --file, or pipe it in")
    if args.system is not None and not args.chat:
        parser.error("--system needs --chat")


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text; of a file or a pipe, one newline at the very end is left out."""
    return args.prompt if args.prompt is not None else read_text(args.file).removesuffix("\n")


def chat_messages(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    """The messages of a chat that begins with the prompt."""
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def add_model_name(parser: argparse._ActionsContainer) -> None:
    """Which model: the argument of `resolve`."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a name on the Hub, a folder, or smollm2, the embedded model (default: TinyLlama-1.1B-Chat)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it computes: the arguments of `load`."""
    group = parser.add_argument_group("model")
    add_model_name(group)
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="of weights and activations (default: float32)",
    )
    group.add_argument(
        "--attention",
        default="sdpa",
        metavar="KERNEL",
        help="eager (the textbook's), sdpa (PyTorch's fused one), a variant's name as in lab.py --list, or "
        "file.py:function (default: sdpa)",
    )


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """How matrices are kept: the argument of `load`."""
    parser.add_argument(
        "--weights",
        default="stored",
        choices=["stored", "int8", "exact", "float32", "bfloat16", "float16"],
        help="how matrices are kept. stored: as in the file, most often in 16 bits: equal to exact but for "
        "rounding, and decodes up to three times as fast; int8: faster again, a little less exact; exact: in "
        "--dtype, and what transformers computes to the last bit (default: %(default)s)",
    )


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Where another attention goes."""
    parser.add_argument("--layers", type=numbers, metavar="N-M,...", help="which ones (default: all)")
    parser.add_argument("--heads", type=numbers, metavar="N-M,...", help="query heads (default: all)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen, and how many: the arguments of `sampling`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="divides the logits; 0 is greedy (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=count,
        default=0,
        metavar="K",
        help="sample among the K most likely tokens; 0 is off (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample within the nucleus of mass P; 1 is off (default: %(default)s)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens that occurred less likely (default: %(default)s)",
    )
    group.add_argument("--seed", type=seed, metavar="N", help="the same seed gives the same tokens")
    group.add_argument(
        "--speculate",
        type=count,
        default=0,
        metavar="N",
        help="guess up to N tokens from the text so far and check them in one pass: the same text, sooner "
        "where it repeats itself or the prompt; 0 is off (default: %(default)s)",
    )


def check_output(parser: argparse.ArgumentParser, option: str, path: Path | None) -> None:
    """Exit with status 2 unless a file can be put there, before anything is computed for it."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        parser.error(f"{option} {path}: expected a file in a folder that exists; make the folder first")


def numbers(text: str) -> tuple[int, ...]:
    """`0-3,7` as (0, 1, 2, 3, 7)."""
    found: list[int] = []
    for part in text.split(","):
        if not re.fullmatch(r"\d{1,5}(-\d{1,5})?", part):
            raise argparse.ArgumentTypeError(f"expected numbers such as 0-3,7, got {text!r}")
        first, *last = map(int, part.split("-"))
        found += range(first, (last or [first])[0] + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0-3,7, got {text!r}")
    return tuple(sorted(set(found)))


def count(text: str) -> int:
    """An integer from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def positive(text: str) -> int:
    """An integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def seed(text: str) -> int:
    """An integer that PyTorch takes as a seed."""
    value = int(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"expected 0 to 2^64 - 1, got {value}")
    return value


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` and `stream` that the options stand for.

    Raises:
        InputError: one has no meaning; before a model is loaded.
    """
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    settings = {name: getattr(args, name) for name in names}
    tinyllama.Sampler(**settings)
    return settings | {"max_new_tokens": args.max_new_tokens, "speculate": args.speculate}


def load(args: argparse.Namespace, weights: str = "exact") -> tuple[Llama, Tokenizer]:
    """The model and tokenizer that the options name, with matrices kept that way.

    Raises:
        InputError: see `tinyllama.load`.
    """
    from tinyllama.device import usable_device
    from tinyllama.lab.kernel_file import load_kernel

    usable_device(args.device)  # before a download of gigabytes
    kernel = load_kernel(args.attention)
    model, tokenizer = tinyllama.load(args.model, device=args.device, dtype=args.dtype, weights=weights)
    model.set_attention(kernel)
    return model, tokenizer


def note_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    """A `warnings.showwarning` of one line, without the place in the code."""
    note(f"warning: {message}")


def rate(tokens: int, seconds: float) -> str:
    """Tokens a second, in words."""
    return f"{tokens / seconds:.1f} tokens/s" if seconds else "none computed"
