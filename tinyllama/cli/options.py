"""Options that several scripts share. Importing this module does not import torch, so `--help` is instant."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tinyllama
from tinyllama.advice import did_you_mean
from tinyllama.cli import together
from tinyllama.cli.terminal import piped, read_text
from tinyllama.errors import InputError
from tinyllama.progress import escape, note
from tinyllama.ranges import numbers

if TYPE_CHECKING:
    from tinyllama import Llama, Ranks, Tokenizer


class Parser(argparse.ArgumentParser):
    """An argument parser that shows examples and reports a bad option in one line, with exit status 2."""

    def __init__(self, description: str | None, examples: str) -> None:
        super().__init__(
            description=description,
            epilog=f"examples:\n{as_started(examples)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with the one line; an option that there is not is told the nearest one."""
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if len(unknown) < len(message.split()):
            option = unknown[0].partition("=")[0]
            known = self._option_string_actions
            message += did_you_mean(option, known) if option.startswith("-") else "; quote the text"
        self.exit(2, f"error: {escape(message)}; see --help\n")


def as_started(examples: str) -> str:
    """The examples as commands of `tinyllama`, if that is how this was started."""
    if not sys.argv[0].startswith("tinyllama "):
        return examples
    examples = re.sub(r"python scripts/(\w+)\.py", r"tinyllama \1", examples)
    return re.sub(r"scripts/(\w+)\.py", r"-m tinyllama \1", examples)  # of torchrun


def add_prompt_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Where the prompt comes from, and whether it is a chat; see `read_prompt`."""
    parser.add_argument(
        "prompt", nargs="*", help=f"the text to {purpose}; under --chat, the user's message; best in quotes"
    )
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a file; - is stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system message of the chat")


def read_prompt(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The prompt's text: its words, joined by spaces if the shell split them.

    Of a file or a pipe, one newline at the very end is left out.

    Exits with status 2 unless there is exactly one prompt.
    """
    if args.prompt and args.file is not None:
        parser.error("give the prompt as an argument or by --file, not both")
    if not args.prompt and together.rank() > 0:
        return ""  # rank 0 reads it, for all
    if not args.prompt and args.file is None and not piped():
        parser.error("no prompt: give one as an argument, by --file, or pipe it in")
    if args.system is not None and not args.chat:
        parser.error("--system needs --chat")
    return " ".join(args.prompt) if args.prompt else read_text(args.file).removesuffix("\n")


def chat_messages(args: argparse.Namespace) -> list[dict[str, str]]:
    """The messages of a chat that begins with the prompt."""
    return [*system_message(args.system), {"role": "user", "content": args.prompt}]


def system_message(text: str | None) -> list[dict[str, str]]:
    """The messages before the user's first one."""
    return [] if text is None else [{"role": "system", "content": text}]


def add_model_name(parser: argparse._ActionsContainer) -> None:
    """Which model: the argument of `resolve`."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        help="a name on the Hub, a folder, or smollm2, the embedded model (default: TinyLlama-1.1B-Chat)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it computes; see `load`."""
    group = parser.add_argument_group("model")
    add_model_name(group)
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: %(default)s)")
    group.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="of weights and activations (default: %(default)s)",
    )
    group.add_argument(
        "--attention",
        default="sdpa",
        metavar="KERNEL",
        help="eager (the textbook's), sdpa (PyTorch's fused one), a variant's name as in lab.py --list, or "
        "file.py:function (default: %(default)s)",
    )
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads that compute (default: all cores)"
    )


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """How matrices are kept, and whether decode steps are recorded; see `load`."""
    add_weights_option(parser)
    parser.add_argument(
        "--graph",
        action="store_true",
        help="on a GPU, record the first decode step as a CUDA graph and replay it for the others: the same "
        "bits, some four times as fast",
    )


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """How several ranks share the model; see `load`."""
    group = parser.add_argument_group("under torchrun (see docs/parallel.md)")
    group.add_argument(
        "--split",
        choices=["exact", "fast"],
        help="how matrices are shared: exact gives the bits of one process, fast sends half as many messages "
        "(default: exact)",
    )
    add_pipeline_option(group)


def add_pipeline_option(parser: argparse._ActionsContainer) -> None:
    """Into how many stages several ranks divide the layers; see `load`."""
    parser.add_argument(
        "--pipeline",
        type=positive,
        metavar="N",
        help="under torchrun, divide the layers into N stages and the ranks among them, where matrices alone "
        "are not enough (default: 1)",
    )


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """How matrices are kept; see `load`."""
    parser.add_argument(
        "--weights",
        default="stored",
        choices=["stored", "int8", "exact", "float32", "bfloat16", "float16"],
        help="how matrices are kept. stored: as in the file, most often in 16 bits: equal to exact but for "
        "rounding, and up to three times as fast to decode; int8: faster still, a little less exact; exact: "
        "in --dtype, and what transformers computes to the last bit (default: %(default)s)",
    )


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Which layers and heads get another attention."""
    parser.add_argument("--layers", type=places, metavar="N-M,...", help="which ones (default: all)")
    parser.add_argument("--heads", type=places, metavar="N-M,...", help="query heads (default: all)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen, and how many; see `sampling`."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-n", "--max-new-tokens", type=count, default=256, metavar="N", help="default: %(default)s"
    )
    for option, kind, default, metavar, text in (
        ("--temperature", float, 0.0, "T", "divides the logits; 0 is greedy"),
        ("--top-k", count, 0, "K", "sample among the K most likely tokens; 0 is off"),
        ("--top-p", float, 1.0, "P", "sample within the nucleus of mass P; 1 is off"),
        ("--repetition-penalty", float, 1.0, "R", "above 1 makes tokens that occurred less likely"),
    ):
        group.add_argument(
            option, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s)"
        )
    group.add_argument("--seed", type=seed, metavar="N", help="the same seed gives the same tokens")
    group.add_argument(
        "--speculate",
        type=count,
        default=0,
        metavar="N",
        help="guess up to N tokens from the text so far and check them in one pass: the same text, sooner "
        "if it repeats itself or the prompt; 0 is off (default: %(default)s)",
    )


def check_output(parser: argparse.ArgumentParser, option: str, path: Path | None) -> None:
    """Exit with status 2 unless a file can be put there, before anything is computed for it."""
    if path is None:
        return
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # finds a name that no file can have
    except (OSError, ValueError) as error:
        parser.error(f"{option} {path!s:.80}: {getattr(error, 'strerror', error)}; give another place")
    folder = path.absolute().parent
    if not folder.is_dir() or (path.exists() and not path.is_file()):
        parser.error(f"{option} {path}: expected a file in a folder that exists; make the folder first")
    if not os.access(folder, os.W_OK):
        parser.error(f"{option} {path}: nothing can be written in {folder}; give another place")


def places(text: str) -> tuple[int, ...]:
    """Numbers of layers or heads, for `type=`; see `numbers`."""
    try:
        return numbers(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def integers(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `low` to `high`, for `type=`."""

    def integer(text: str) -> int:
        """The integer; ArgumentTypeError if it is out of bounds."""
        value = int(text)
        if value < low or (high is not None and value > high):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {value}")
        return value

    return integer


count = integers(0)
positive = integers(1)
seed = integers(0, 2**64 - 1)  # what PyTorch takes


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` and `stream` that the options stand for.

    Raises:
        InputError: a value is out of range; found before a model is loaded.
    """
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    settings = {name: getattr(args, name) for name in names}
    tinyllama.Sampler(**settings)
    return settings | {"max_new_tokens": args.max_new_tokens, "speculate": args.speculate}


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """How ranks share the model, as arguments of `tinyllama.load`.

    Raises:
        InputError: there are none to share it.
    """
    given = {name: value for name in ("split", "pipeline") if (value := getattr(args, name, None))}
    if given and together.size() == 1:
        raise InputError(f"--{min(given)} is for several ranks; start the script by torchrun")
    return given


def join(args: argparse.Namespace) -> Ranks | None:
    """Meet the other processes that torchrun started; None for a single one.

    Raises:
        InputError: the device cannot be used, or not by several ranks, or they have other options.
        RankError: the others did not come.
    """
    from tinyllama.device import usable_device

    if together.size() > 1 and args.device not in ("cpu", "cuda"):
        raise InputError(
            f"--device {args.device}: several ranks take cpu, or cuda, which gives each a GPU of its own"
        )
    return together.join(on_gpus=usable_device(args.device).type == "cuda")


def load(
    args: argparse.Namespace, weights: str = "exact", graph: bool = False, whole: bool = False
) -> tuple[Llama, Tokenizer]:
    """The model and tokenizer that the options name; the others are those of `tinyllama.load`.

    Under torchrun each rank gets its part; `whole` gives each the whole model.

    Raises:
        InputError: see `tinyllama.load`.
    """
    from tinyllama.device import usable_device
    from tinyllama.lab.kernel_file import load_kernel

    sharing = shared(args)
    if together.size() > 1 and graph:
        raise InputError(
            "--graph: a graph records the work of one process; leave it out, or start it by python"
        )
    device, ranks = usable_device(args.device), join(args)  # before a download of gigabytes
    if graph and device.type != "cuda":
        raise InputError("--graph is for --device cuda; on a CPU --weights stored is what is fast")
    if graph and args.speculate:
        raise InputError("--graph and --speculate do not go together: a recorded step has one token")
    return tinyllama.load(
        args.model,
        device=device,
        dtype=args.dtype,
        attention=load_kernel(args.attention),  # refused before a model is looked for
        weights=weights,
        threads=args.threads,
        graph=graph,
        ranks=ranks,
        **({"split": "whole"} if whole else sharing),
    )


def note_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    """A `warnings.showwarning` that prints one line, without the place in the code."""
    note(f"warning: {message}")


def rate(tokens: int, seconds: float) -> str:
    """Tokens a second, in words."""
    return f"{tokens / seconds:.1f} tokens/s" if seconds else "none computed"
