"""Kernels by name, by layer and by head."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama.attention import Attention, AttentionContext, Kernel, check_result, eager, sdpa
from tinyllama.device import described
from tinyllama.errors import InputError
from tinyllama.ranges import numbers

Tapped = Callable[[Tensor], Tensor]
# Layers or heads: all, one, some, or as on a command line ("0-3,7").
Places = Iterable[int] | int | str | None
KERNELS: dict[str, Kernel] = {"eager": eager, "sdpa": sdpa}


def kernel(given: Kernel | str) -> Kernel:
    """The kernel itself, or the one of a name, as `lab.load_kernel` takes it.

    Raises:
        InputError: there is none of that name, or what is given cannot be called.
    """
    if isinstance(given, str):
        from tinyllama.lab.kernel_file import load_kernel  # here, because the lab imports this file

        return load_kernel(given)
    if not callable(given) or isinstance(given, type):
        got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise InputError(
            f"attention: expected a function (q, k, v, context) or a kernel's name, as 'window', got {got}"
        )
    return given


def kernel_name(kernel: Kernel) -> str:
    """As a user would write it: `window`, or `window(size=64)` for a kernel with a setting of its own."""
    if isinstance(kernel, partial) and not kernel.keywords:
        return kernel_name(kernel.func)
    if isinstance(kernel, partial):
        settings = ", ".join(f"{name}={value!r}" for name, value in kernel.keywords.items())
        return f"{kernel_name(kernel.func)}({settings})"
    return getattr(kernel, "__name__", type(kernel).__name__)


def kernel_code(kernel: Kernel) -> CodeType | None:
    """The Python code of a function, a partial of one, or a module's `forward`; None if it has none."""
    if isinstance(kernel, partial):
        return kernel_code(kernel.func)
    kernel = inspect.unwrap(kernel)  # of a declaration such as @breaks
    for function in (kernel, getattr(kernel, "forward", None), getattr(kernel, "__call__", None)):  # noqa: B004
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            return code
    return None


def kernel_source(kernel: Kernel) -> str | None:
    """A digest of the code of a user's kernel; None for one of this package, or without source."""
    code = kernel_code(kernel)
    if code is None or Path(code.co_filename).is_relative_to(Path(__file__).parent):
        return None
    try:
        return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:16]
    except OSError:
        return None


def wrong_result(z: Any, q: Tensor, kernel: Kernel) -> InputError:
    """What to say of a kernel that returned `z` for the queries `q`."""
    code = kernel_code(kernel)
    place = f"{code.co_filename}:{code.co_firstlineno}" if code else "attention"
    return InputError(
        f"{place}: the kernel {kernel_name(kernel):.80} must return a tensor like its queries, "
        f"{described(q)}, but returned {described(z)}"
    )


def set_attention(
    attentions: Mapping[int, Attention],
    given: Kernel | str,
    layers: Places,
    heads: Places,
    num_heads: int,
) -> None:
    """Let layers and query heads (None: all) attend by a kernel; arguments are checked before any change.

    Raises:
        InputError: there is no such kernel, layer or head.
    """
    new = kernel(given)
    chosen = _within(layers, "layers", attentions)
    some = None if heads is None else _within(heads, "heads", range(num_heads))
    if some == []:
        return
    for layer in chosen:
        attention = attentions[layer]
        attention.kernel = new if some is None else ByHead(new, some, attention.kernel)


def _within(places: Places, what: str, known: Collection[int]) -> list[int]:
    """The numbers, or all that are known."""
    if isinstance(places, str):
        places = numbers(places, f"{what}: ")
    chosen = [places] if isinstance(places, int) else list(known if places is None else places)
    wrong = [number for number in chosen if number not in known]
    if wrong:
        raise InputError(f"{what}: expected 0 to {max(known)}, got {wrong[0]}")
    return chosen


class ByHead(nn.Module):
    """A kernel in which some query heads attend by `kernel` and the others by `others`.

    Both compute all heads, so that each kernel sees the layer as it is (head numbers, groups); half of the
    work is thrown away. Taps give out one value in which every head is by its own kernel; where only one of
    the two has scores, all heads of that value are by that one.
    """

    def __init__(self, kernel: Kernel, heads: Iterable[int], others: Kernel) -> None:
        super().__init__()
        self.kernel: Kernel = kernel
        self.heads = tuple(heads)
        # Assigned to the same heads again, the kernel before has nothing left to do.
        while isinstance(others, ByHead) and set(others.heads) <= set(self.heads):
            others = others.others
        self.others: Kernel = others

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """As any kernel."""
        chosen = torch.tensor([head in self.heads for head in context.heads], device=q.device)
        chosen = chosen[:, None, None]  # (H, 1, 1)
        scores, pattern = _Merged(context.scores, chosen), _Merged(context.pattern, chosen)
        first = replace(context, scores=scores.first, pattern=pattern.first)
        second = replace(context, scores=scores.second, pattern=pattern.second)
        z_others = self.others(q, k, v, first)
        check_result(z_others, q, self.others)
        z = self.kernel(q, k, v, second)
        check_result(z, q, self.kernel)
        if torch.is_grad_enabled() and (scores.merged or pattern.merged):
            # From the values that the taps returned: else these would have the gradient of some heads only.
            again = replace(context, scores=scores.again, pattern=pattern.again)
            z_others = self.others(q, k, v, again)
        return torch.where(chosen, z, z_others)

    @property
    def __name__(self) -> str:
        """For print(model)."""
        heads = ", ".join(map(str, self.heads))
        return f"{kernel_name(self.kernel)} in heads {heads}, {kernel_name(self.others)} in the others"


class _Merged:
    """One tap for two kernels: the others' value comes first, and is kept to complete the second one."""

    def __init__(self, tap: Tapped, chosen: Tensor) -> None:
        self.tap, self.chosen = tap, chosen
        self.of_others: list[Tensor] = []
        self.given: list[Tensor] = []

    @property
    def merged(self) -> bool:
        return len(self.given) > 1

    def first(self, x: Tensor) -> Tensor:
        self.of_others.append(x)
        self.given.append(self.tap(x))
        return self.given[-1]

    def second(self, x: Tensor) -> Tensor:
        self.given.append(self.tap(torch.where(self.chosen, x, self.of_others[-1]) if self.given else x))
        return self.given[-1]

    def again(self, x: Tensor) -> Tensor:
        return self.given[-1]
