"""`check_attention`: does a kernel keep the contract? If not, which clause, and the smallest example.

Every clause is tried on texts from one token upwards, so the first example that breaks it is the smallest.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tinyllama.attention import Kernel
from tinyllama.errors import InputError
from tinyllama.kernels import kernel_name
from tinyllama.lab.checks import CHECKS, Trial
from tinyllama.lab.clauses import CLAUSES, broken_clauses, undeclared


@dataclass(frozen=True)
class Clause:
    """One clause of the contract, tried on a kernel.

    Attributes:
        name: of the clause; `CLAUSES` says what it asks for.
        example: the smallest one that breaks it; None where it is kept.
        declared: whether the kernel declares that it breaks it.
    """

    name: str
    example: str | None
    declared: bool

    @property
    def verdict(self) -> str:
        """kept, declared (broken, as declared) or BROKEN."""
        return "kept" if self.example is None else "declared" if self.declared else "BROKEN"


@dataclass(frozen=True)
class Contract:
    """A kernel's clauses; after a broken shape no other is tried."""

    kernel: str
    clauses: tuple[Clause, ...]

    @property
    def passed(self) -> bool:
        """Every clause is kept, or declared to be broken."""
        return all(clause.verdict != "BROKEN" for clause in self.clauses)

    def __str__(self) -> str:
        """A line for each clause."""
        lines = [f"{self.kernel}: {'keeps the contract' if self.passed else 'BREAKS the contract'}"]
        for clause in self.clauses:
            said = clause.example or CLAUSES[clause.name] + ("; declared in vain" if clause.declared else "")
            lines.append(f"  {clause.verdict:<9}{clause.name:<9} {said}")
        return "\n".join(lines)


def check_attention(
    kernel: Kernel, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, layer: int = 0
) -> Contract:
    """Try a kernel on every clause of the contract, on random queries, keys and values.

    Args:
        kernel: what is in question.
        heads: H, query heads.
        kv_heads: K.
        head_dim: D.
        layer: the one it is told it is in.

    What the kernel declares (`breaks`) is tried too, and told apart from what it breaks unsaid.

    Raises:
        InputError: the heads do not divide, or the kernel refuses them or its settings.
    """
    if heads % kv_heads:
        raise InputError(f"check_attention: {heads} query heads cannot share {kv_heads} KV heads evenly")
    trial = Trial(undeclared(kernel), heads, kv_heads, head_dim, layer)
    declared = broken_clauses(kernel)
    clauses: list[Clause] = []
    for name, check in CHECKS.items():
        clauses.append(Clause(name, _first(trial, check(trial)), name in declared))
        if name == "shape" and clauses[0].example is not None:
            break
    return Contract(kernel_name(kernel), tuple(clauses))


def _first(trial: Trial, examples: Iterator[str]) -> str | None:
    try:
        return next(examples, None)
    except InputError:
        raise
    except Exception as error:
        # Where in the kernel's own file, rather than deep inside PyTorch.
        kernel = trial.kernel.func if isinstance(trial.kernel, partial) else trial.kernel
        code = getattr(getattr(kernel, "forward", kernel), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if code and frame.filename == code.co_filename] or frames)[-1]
        message = str(error).strip().split("\n")[0]
        return f"T={trial.tried[-1]}: {type(error).__name__}: {message} (line {last.lineno}: {last.line})"
