"""Judge a learner's function: right, or what is wrong with it, as exactly as can be said."""

from __future__ import annotations

import copy
import ctypes
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tinyllama.learn import mistakes, ours
from tinyllama.learn.steps import Case, cases
from tinyllama.parity.measure import CEILING
from tinyllama.parity.scene import relative_error
from tinyllama.parity.suspects import explained

LIMIT = CEILING[torch.float32]  # on the relRMS of a value; a right one has 1e-7 to 1e-6
SECONDS = 60.0  # that one function may take
SAME = 1e-3  # a value of another shape with at most this relRMS is explained by the mistake
SETTINGS: tuple[tuple[float, int, float], ...] = (
    (0, 0, 1),
    (1, 0, 1),
    (0.5, 0, 1),
    (1.5, 0, 1),
    (1, 3, 1),
    (1, 0, 0.7),
    (0.6, 0, 0.8),
    (0.6, 5, 0.9),
)
DRAWS = 400  # of each setting
STEPS = tuple(ours.FUNCTIONS)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """What there is to say of one function.

    Attributes:
        step: its name.
        status: "missing" is a function that is not written yet.
        says: what was found, in lines.
        suspect: the mistake that explains it, or None.
    """

    step: str
    status: Literal["right", "wrong", "missing"]
    says: str = ""
    suspect: str | None = None

    @property
    def right(self) -> bool:
        """Whether it is right."""
        return self.status == "right"

    @property
    def sign(self) -> str:
        """The status in a word or two."""
        return {"right": "✓ right", "wrong": "✗ wrong", "missing": "· not written yet"}[self.status]

    def __str__(self) -> str:
        """In a few lines."""
        lines = [f"{self.step:<12} {self.sign}", *self.says.splitlines()]
        if self.suspect:
            lines.append(f"suspect: {self.suspect}")
        return "\n    ".join(lines)


class _WrongError(Exception):
    """What is wrong, with its suspect."""


class TimeIsUp(BaseException):
    """Raised in a function that takes too long; not an Exception, so that its `except` does not hold it."""


@torch.no_grad()
def judge(step: str, function: Function, seconds: float = SECONDS) -> Verdict:
    """Try one function; what it calls by the names of the other steps is the project's own meanwhile.

    Args:
        step: its name.
        function: the learner's.
        seconds: how long it may take in all.
    """
    try:
        with time_limit(seconds), using(function, ours.FUNCTIONS, but=step):
            if step == "sample":
                said = _try_sample(function)
            else:
                said = ""
                for case in cases(step):
                    _try(step, function, case)
    except NotImplementedError as error:
        if str(error):
            return Verdict(step, "wrong", place(error, function))
        return Verdict(step, "missing")
    except _WrongError as found:
        return Verdict(step, "wrong", *found.args)
    except TimeIsUp as error:
        return Verdict(step, "wrong", f"still busy after {seconds:g} s: {place(error, function)}")
    except Exception as error:
        return Verdict(step, "wrong", place(error, function))
    return Verdict(step, "right", said)


def _try(step: str, function: Function, case: Case) -> None:
    """Raise _WrongError unless the function is right in this case."""
    given = copy.deepcopy([one for one in case.arguments if not callable(one)])
    got = _decoded(function, case) if step == "decode" else function(*case.arguments)
    value = as_tensor(got)
    for one, before in zip((one for one in case.arguments if not callable(one)), given, strict=True):
        if changed(one, before):
            raise _WrongError(
                "it changes one of its arguments, which other functions still need: work on a copy"
            )
    expected = case.expected
    with_case = f"with {case.says}: "
    if value.shape != expected.shape:
        shapes = f"{with_case}shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        raise _WrongError(shapes, _other_shape(value.double(), expected, case))
    if not value.dtype.is_floating_point:
        raise _WrongError(f"{with_case}numbers of {value.dtype}, expected floating point")
    error = relative_error(value.double(), expected)
    if error > LIMIT:
        raise _WrongError(with_case + first_difference(value.double(), expected), _named(value, case))


def _decoded(function: Function, case: Case) -> Tensor:
    calls, weights, config = case.arguments
    cache: dict[Any, Any] = {}
    longest: list[int] = []

    def counting(function: Function, x: Tensor, *more: Any) -> Any:
        longest[-1] = max(longest[-1], len(x))
        return function(x, *more)

    parts = {name: partial(counting, ours.FUNCTIONS[name]) for name in ("block", "llama")}
    logits = []
    for ids in calls:
        longest.append(0)
        with using(function, parts, but="decode"):
            logits.append(as_tensor(function(ids, weights, config, cache)))
    if all(len(one) == len(ids) for one, ids in zip(logits, calls, strict=True)) and longest[-1] > len(
        calls[-1]
    ):
        raise _WrongError(f"for one new token it computes {longest[-1]} again: use what the cache holds")
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in logits])


def _named(value: Tensor, case: Case) -> str | None:
    low = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(value.dtype)
    found = explained(case.formulas(value.double()), value.double())
    return found or (f"it computes in {low}: keep the dtype of what comes in" if low else None)


def _other_shape(value: Tensor, expected: Tensor, case: Case) -> str | None:
    """The mistake that gives a value of this shape."""
    for name, other in case.shapes() if case.shapes else ():
        if relative_error(value, other.double()) < SAME:
            return name
    if value.shape[1:] == expected.shape and len(value) == 1:
        return "there is a batch axis; every tensor here is of one text"
    if value.dim() == 2 and relative_error(value.T, expected) < SAME:
        return "the right numbers, transposed"
    if value.numel() == expected.numel() and relative_error(value.reshape(expected.shape), expected) < SAME:
        return "the right numbers in another shape"
    return None


def first_difference(value: Tensor, expected: Tensor) -> str:
    """How many numbers are wrong, and the first of them."""
    limit = LIMIT * expected[expected.isfinite()].square().mean().sqrt()
    wrong = ~((value - expected).abs() <= limit) & (value != expected)  # NaN is wrong
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong, the first at {list(place)}: "
        f"got {value[place].item():.6g}, expected {expected[place].item():.6g}"
    )


# --- sampling ---------------------------------------------------------------------------------------------


def _try_sample(function: Function) -> str:
    """Raise _WrongError unless ids are drawn as they should be; says if they are drawn in another way."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 0.7
    seeds = torch.Generator().manual_seed(0)
    drawn, same = [], True
    for setting in SETTINGS:
        ids = torch.tensor([_id(function, logits, setting, seeds) for _ in range(DRAWS if setting[0] else 3)])
        drawn.append(ids)
        one, two = (_id(function, logits, setting, torch.Generator().manual_seed(3)) for _ in range(2))
        if one != two:
            raise _WrongError(
                f"{_words(setting)}: the same seed gives {one} and {two}: draw with the generator"
            )
        theirs, mine = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        same &= [_id(function, logits, setting, theirs) for _ in range(50)] == [
            ours.sample(logits, *setting, mine) for _ in range(50)
        ]
    formulas = [list(mistakes.probabilities(logits.double(), *setting)) for setting in SETTINGS]
    for setting, ids, named in zip(SETTINGS, drawn, formulas, strict=True):
        if not _fits(ids, named[0][1]):
            words = _words(setting)
            counts = torch.bincount(ids, minlength=len(logits)) / len(ids)
            most = int((counts - named[0][1]).abs().argmax())
            right = named[0][1][most]
            said = f"{words}: id {most} is drawn in {counts[most]:.1%} of the draws, expected {right:.1%}"
            everywhere = [name for name in dict(formulas[-1]) if _fits_all(name, drawn, formulas)]
            here = [name for name, p in named[1:] if _fits(ids, p)]
            raise _WrongError(said, next(iter(everywhere + here), None))
    return "" if same else "the seed gives other ids than torch.multinomial, and so than transformers"


def _words(setting: tuple[float, int, float]) -> str:
    return "temperature {:g}, top_k {}, top_p {:g}".format(*setting)


def _id(function: Function, logits: Tensor, setting: tuple[float, int, float], seeds: torch.Generator) -> int:
    before = logits.clone()
    got = function(logits, *setting, seeds)
    if not torch.equal(logits, before):
        raise _WrongError("it changes the logits that it is given: work on a copy")
    value = as_tensor(got)
    if value.numel() != 1 or value.is_complex() or float(value) != int(value):
        raise _WrongError(f"{_words(setting)}: expected an id, a whole number, got {got!r:.60}")
    if not 0 <= int(value) < len(logits):
        raise _WrongError(f"{_words(setting)}: id {int(value)} is none of the {len(logits)} there are")
    return int(value)


def _fits_all(name: str, drawn: list[Tensor], formulas: list[list[tuple[str, Tensor]]]) -> bool:
    """Whether a mistake explains the draws of every setting in which it can be made."""
    pairs = [(ids, dict(named)) for ids, named in zip(drawn, formulas, strict=True)]
    return bool(name) and all(_fits(ids, named[name]) for ids, named in pairs if name in named)


def _fits(ids: Tensor, p: Tensor) -> bool:
    """Whether ids can have been drawn from p: by chi-squared, wrong once in a million."""
    counts = torch.bincount(ids, minlength=len(p)).double()
    expected = p * len(ids)
    if bool((counts[expected == 0] > 0).any()):
        return False
    often = expected >= 3
    pairs = list(zip(counts[often].tolist(), expected[often].tolist(), strict=True))
    pairs.append((counts[~often].sum().item(), expected[~often].sum().item()))
    chi = sum((seen - likely) ** 2 / max(likely, 3) for seen, likely in pairs)
    freedom = max(len(pairs) - 1, 1)
    # Wilson and Hilferty (1931): the cube root is nearly normal; 4.75 deviations are one in a million.
    return ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5 < 4.75


# --- running somebody's code ------------------------------------------------------------------------------


def as_tensor(value: Any) -> Tensor:
    """What a function gave, as a tensor: of numbers, lists and arrays, too."""
    if value is None:
        raise _WrongError("it returns nothing: `return` is missing")
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(one, (Tensor, list, tuple)) for one in value):
        parts = [as_tensor(one) for one in value]
        if len({part.shape for part in parts}) != 1:
            raise _WrongError(
                f"it returns a list of different shapes, {[tuple(part.shape) for part in parts]!s:.80}"
            )
        return torch.stack(parts)
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _WrongError(f"expected numbers, got {type(value).__name__}") from error


def changed(one: Any, before: Any) -> bool:
    """Whether a tensor, or one in a mapping, is not what it was."""
    if isinstance(one, Tensor):
        return not torch.equal(one, before)
    if isinstance(one, Mapping):
        return any(changed(value, before.get(name)) for name, value in one.items())
    return isinstance(one, Sequence) and any(map(changed, one, before))


@contextmanager
def using(function: Function, functions: Mapping[str, Function], but: str) -> Iterator[None]:
    """Let the names of these functions, but one, mean these in the code of a learner's function."""
    names = getattr(function, "__globals__", {})
    others = {name: one for name, one in functions.items() if name != but}
    before = {name: names[name] for name in others if name in names}
    names.update(others)
    try:
        yield
    finally:
        for name in others:
            del names[name]
        names.update(before)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in this thread if the block takes longer; again each second, should it be caught."""
    thread, done, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def end() -> None:
        wait = seconds
        while not done.wait(wait):
            with lock:  # once the block is left, nothing is raised any more
                if not done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(TimeIsUp)
                    )
            wait = 1.0

    timer = threading.Thread(target=end, daemon=True)
    timer.start()
    try:
        yield
    finally:
        with lock:
            done.set()
        timer.join()


def place(error: BaseException, function: Function) -> str:
    """The line of the learner's code in which an error came up, and what it says."""
    code = getattr(function, "__code__", None)
    file = code.co_filename if code else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"line {frames[-1].lineno}, `{frames[-1].line}`" if frames else "outside your code"
    if isinstance(error, TimeIsUp):
        return where
    said = " ".join(str(error).split())
    if "shapes cannot be multiplied" in said:
        said += "; a matrix is kept as (out, in), so x @ W.T"
    return f"{where}: {type(error).__name__}{said and ': '}{said:.200}"
