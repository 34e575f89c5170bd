"""Check a learner's Llama: each function, what a trained model writes with it, and the whole."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from markupsafe import Markup
from torch import Tensor

from tinyllama.checkpoints.load import load
from tinyllama.errors import InputError
from tinyllama.learn.course import read
from tinyllama.learn.graft import PROMPT, Text, write
from tinyllama.learn.judge import (
    LIMIT,
    SECONDS,
    STEPS,
    Function,
    TimeIsUp,
    Verdict,
    as_tensor,
    judge,
    time_limit,
    using,
)
from tinyllama.model import Llama
from tinyllama.pages.cell import table
from tinyllama.parity.oracle import oracle_logits
from tinyllama.progress import escape
from tinyllama.text.tokenizer import Tokenizer

ROUNDS = 3  # of timing, interleaved
TIMED = 12  # tokens of a round


@dataclass(frozen=True)
class Whole:
    """A learner's Llama, judged like any other.

    Attributes:
        verdict: what `compare` says, beside transformers where that is installed.
        passed: whether its error is no larger than rounding explains.
        speed: tokens a second, with its own cache and sampler.
        our_speed: of this project's model, as exact, in the same rounds.
    """

    verdict: str
    passed: bool
    speed: float
    our_speed: float


@dataclass(frozen=True)
class Report:
    """What there is to say of some functions; as the last expression of a notebook's cell, a readable list.

    Attributes:
        verdicts: of each, in the order of the steps.
        text: what a trained model writes with the right ones in the place of ours; "" without a right one.
        whole: of all ten together, once they are right.
    """

    verdicts: list[Verdict]
    text: str
    whole: Whole | None

    @property
    def right(self) -> list[str]:
        """The right ones."""
        return [one.step for one in self.verdicts if one.right]

    def __str__(self) -> str:
        """For a terminal."""
        lines = [str(one) for one in self.verdicts]
        if self.text:
            lines += ["", self.text]
        if self.whole:
            whole = self.whole
            lines += ["", "all ten are right. The whole, judged like any other Llama:", whole.verdict]
            lines.append(
                f"{whole.speed:.1f} tokens/s with your cache and sampler, {whole.our_speed:.1f} with ours"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For a notebook."""
        rows = []
        for one in self.verdicts:
            said = [one.says, f"suspect: {one.suspect}" if one.suspect else ""]
            rows.append([one.step, one.sign, Markup("<br>").join(filter(None, said))])
        rest = str(self).partition("\n\n")[2]
        whole = table("your functions", ["step", "", "what was found"], rows)
        return whole + Markup("<pre>{}</pre>").format(escape(rest, "\n"))


def check(
    source: str | Path | Mapping[str, Function] | None = None,
    /,
    *,
    model: Llama | None = None,
    tokenizer: Tokenizer | None = None,
    done: Callable[[str], object] = lambda what: None,
    seconds: float = SECONDS,
    **functions: Function,
) -> Report:
    """Judge functions by the names of their steps: `check(rope=my_rotate)`, or those of a file.

    Args:
        source: functions by step, or a file begun with `learn.py start`.
        model: a trained one, in float32 and exact, into which right functions are put; None loads SmolLM2.
        tokenizer: its tokenizer.
        done: is told what is judged.
        seconds: how long each function may take.
        functions: by step.

    Raises:
        InputError: there is no such step, or the file cannot be used.
    """
    if source is not None:
        functions = {**(source if isinstance(source, Mapping) else read(Path(source))), **functions}
    for name, function in functions.items():
        if name not in STEPS or not callable(function):
            what = "is not a function" if name in STEPS else "is no step"
            raise InputError(f"{name} {what}; expected functions by the names {', '.join(STEPS)}")
    if not functions:
        raise InputError(f"nothing to check: give functions by the names {', '.join(STEPS)}")
    verdicts = []
    for name in STEPS:
        if name in functions:
            done(f"judging {name}")
            verdicts.append(judge(name, functions[name], seconds))
    right = {one.step: functions[one.step] for one in verdicts if one.right}
    if not right:
        return Report(verdicts, "", None)
    done("writing")
    if model is None or tokenizer is None:
        model, tokenizer = _trained()
    text = _in_words(model, tokenizer, right)
    whole = _whole(model, tokenizer, right, done) if len(right) == len(STEPS) else None
    return Report(verdicts, text, whole)


@cache
def _trained() -> tuple[Llama, Tokenizer]:
    return load("smollm2", device="cpu", dtype="float32", weights="exact")


def _in_words(model: Llama, tokenizer: Tokenizer, right: Mapping[str, Function]) -> str:
    """What the trained model writes with these functions."""
    ids = tokenizer.encode(PROMPT)
    sampling = (0.8, 0, 0.9) if "sample" in right else (0.0, 0, 1.0)
    text = write(model, right, ids, sampling=sampling)
    how = " and seed 0 at temperature 0.8" if "sample" in right else ""
    lines = [f"With {', '.join(right)} of yours in a trained model{how}:", tokenizer.decode(ids + text.ids)]
    if not text.whole:
        lines.append(
            f"({len(text.ids)} tokens in {text.seconds:.0f} s: right, but slow; matrix products are faster)"
        )
    return "\n".join(lines)


def _whole(
    model: Llama, tokenizer: Tokenizer, functions: Mapping[str, Function], done: Callable[[str], object]
) -> Whole:
    """Judge the ten functions as one Llama, and time it beside ours."""
    done("comparing the whole")
    ids = tokenizer.encode(f"{PROMPT} a wise and kind woman.")
    weights, config = dict(model.state_dict()), model.config

    def mine(ids: Tensor) -> Tensor:
        with ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(using(function, dict(functions), but=name))
            return as_tensor(functions["llama"](ids[0], weights, config))

    truth = oracle_logits(asdict(config), weights, ids)
    try:
        with torch.no_grad(), time_limit(SECONDS):
            said, passed = _compared(mine, model, ids, truth)
    except TimeIsUp:
        said, passed = f"not compared: {len(ids)} tokens took over {SECONDS:g} s", False
    speeds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for one, (some, speed) in enumerate(zip((functions, {}), speeds, strict=True)):
            done(f"timing {'ours' if one else 'yours'}")
            speed.append(_rate(write(model, some, ids, TIMED)))
    return Whole(said, passed, *map(statistics.median, speeds))


def _compared(
    mine: Callable[[Tensor], Tensor], model: Llama, ids: list[int], truth: Tensor
) -> tuple[str, bool]:
    try:
        from tinyllama.parity.comparison import compare
        from tinyllama.parity.reference import reference_model
    except ModuleNotFoundError:  # transformers is an extra
        from tinyllama.parity.scene import relative_error

        error = relative_error(mine(torch.tensor([ids])), truth)
        return (
            f"relRMS {error:.2e} of the float64 oracle's logits (transformers is not installed)",
            error <= LIMIT,
        )
    found = compare(mine, reference_model(model, "eager"), ids, truth)
    return str(found), found.verdict.passed


def _rate(text: Text) -> float:
    return len(text.ids) / text.seconds
