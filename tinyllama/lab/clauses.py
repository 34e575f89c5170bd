"""The twelve clauses of the contract of attention kernels, and how a kernel declares that it breaks some."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama.attention import AttentionContext, Kernel
from tinyllama.errors import InputError
from tinyllama.kernels import ByHead, kernel_name

CLAUSES = {
    "shape": "returns (B, H, T, D) for any number of rows, queries and keys",
    "pure": "leaves its inputs unchanged and returns the same result again",
    "causal": "a later token changes no bit of an earlier token's output",
    "cache": "token by token from a cache equals the whole text at once",
    "chunks": "a text in pieces equals the whole text at once",
    "batch": "the rows of a batch do not affect each other",
    "padding": "padding on the left changes nothing",
    "groups": "query head h reads KV head h // (H / K)",
    "dtype": "returns the dtype it gets: float64, float32, bfloat16 or float16",
    "finite": "a query that sees no key gets a finite result",
    "gradient": "the gradients of q, k and v are right and finite",
    "compile": "torch.compile makes one graph of it, with the same result",
}
# Without these no other clause means anything.
UNBREAKABLE = ("shape", "pure")


def breaks(*clauses: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Declare that a kernel breaks clauses of the contract: `@breaks("cache")` over its definition.

    Of a module, declare the instance: `kernel = breaks("cache")(MyAttention())`.

    `check_attention` then accepts that they are broken. The kernel refuses every forward pass in which a
    broken clause would give wrong results silently: from a cache ("cache"), of a part of a text ("chunks"),
    of several rows ("batch"), with padding ("padding").

    Raises:
        InputError: there is no such clause, or it may not be broken.
    """
    for clause in clauses:
        if clause not in CLAUSES or clause in UNBREAKABLE:
            known = [name for name in CLAUSES if name not in UNBREAKABLE]
            raise InputError(f"breaks: expected some of {', '.join(known)}, got {clause!r}")

    def declare(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if isinstance(kernel, type):
            raise InputError(
                f"breaks: got the class {kernel.__name__}; declare the kernel that is made of it: "
                f"breaks(...)({kernel.__name__}())"
            )
        if isinstance(kernel, nn.Module):  # stays a module: a function around it would hide its weights
            name = kernel_name(kernel)
            kernel.register_forward_pre_hook(lambda _, x: _refuse(name, clauses, x[0], x[1], x[3]))
            kernel.broken_clauses = broken_clauses(kernel) | set(clauses)  # type: ignore[assignment]
            return kernel

        @functools.wraps(kernel)
        def declared(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, **settings: Any) -> Tensor:
            _refuse(kernel_name(kernel), clauses, q, k, context)
            return kernel(q, k, v, context, **settings)

        declared.__name__ = kernel_name(kernel)  # which a partial has not
        declared.broken_clauses = broken_clauses(kernel) | set(clauses)  # type: ignore[attr-defined]
        return declared

    return declare


def broken_clauses(kernel: Kernel) -> frozenset[str]:
    """The clauses that a kernel declares it breaks."""
    if isinstance(kernel, functools.partial):
        return broken_clauses(kernel.func)
    if isinstance(kernel, ByHead):
        return broken_clauses(kernel.kernel) | broken_clauses(kernel.others)
    return getattr(kernel, "broken_clauses", frozenset())


def undeclared(kernel: Kernel) -> Kernel:
    """The kernel without its declarations, which refuses nothing: to check whether they are true."""
    if isinstance(kernel, functools.partial):
        return functools.partial(undeclared(kernel.func), *kernel.args, **kernel.keywords)
    if isinstance(kernel, ByHead):
        return ByHead(undeclared(kernel.kernel), kernel.heads, undeclared(kernel.others))
    if isinstance(kernel, nn.Module) and broken_clauses(kernel):
        return kernel.forward  # without the hook that refuses
    wrapped = getattr(kernel, "__wrapped__", None)
    return undeclared(wrapped) if wrapped is not None and broken_clauses(kernel) else kernel


def remedy(broken: Collection[str]) -> str:
    """What to write if a kernel is meant to break these clauses; empty if it must not, or breaks none."""
    if not broken or set(broken) & set(UNBREAKABLE):
        return ""
    names = ", ".join(f'"{name}"' for name in broken)
    return (
        f"if that is meant, write @tinyllama.lab.breaks({names}) over it, or give lab.py "
        f"--breaks {','.join(broken)}: it is measured all the same"
    )


def _refuse(name: str, clauses: Collection[str], q: Tensor, k: Tensor, context: AttentionContext) -> None:
    """Raise InputError if this pass needs one of the clauses."""
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    got = None
    if "cache" in clauses and T == 1 < S:
        got = f"1 query for {S} keys of a cache"
    if "chunks" in clauses and 1 < T < S:
        got = f"{T} queries for {S} keys"
    if "batch" in clauses and B > 1:
        got = f"{B} rows"
    if "padding" in clauses and _padded(context):
        got = "padding on the left"
    if "groups" in clauses and len(context.heads) < context.num_heads:
        raise InputError(
            f"{name}: got {len(context.heads)} of {context.num_heads} heads, but it declares that it breaks "
            "groups, so it needs the others' keys and values; run it in one process"
        )
    if got is not None:
        raise InputError(
            f"{name}: got {got}, but it declares that it breaks {', '.join(sorted(clauses))}; "
            "run it on whole texts, one at a time"
        )


def _padded(context: AttentionContext) -> bool:
    # Reads values of a tensor, which a compiled graph cannot do.
    mask = context.mask
    if mask.causal or torch.compiler.is_compiling():
        return False
    return bool((mask.query_positions < 0).any())
