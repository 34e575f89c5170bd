"""`check_attention`: does a kernel keep the contract? If not, which clause, and the smallest example.

Every clause is checked on texts from one token upwards, so the first example that breaks it is the smallest.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tinyllama.attention import Kernel
from tinyllama.errors import InputError
from tinyllama.kernels import kernel_code, kernel_name
from tinyllama.lab.checks import CHECKS, SIZES, Check
from tinyllama.lab.clauses import CLAUSES, broken_clauses, remedy, undeclared
from tinyllama.lab.trial import Trial
from tinyllama.pages import cell


@dataclass(frozen=True)
class Clause:
    """One clause of the contract, checked on a kernel.

    Attributes:
        name: of the clause.
        says: what it demands.
        declared: the kernel declares that it breaks this clause.
        example: the smallest example that breaks it; None if it holds.
        verdict: kept, declared (broken, as declared) or BROKEN.
    """

    name: str
    says: str
    declared: bool
    example: str | None
    verdict: str

    def __str__(self) -> str:
        """One line."""
        return f"  {self.verdict:<9}{self.name:<9} {self.found}"

    @property
    def found(self) -> str:
        """The smallest example that breaks it, or what it demands."""
        in_vain = "; declared broken, but it holds" if self.declared and self.example is None else ""
        return self.example or self.says + in_vain


def advice(clauses: Sequence[Clause]) -> str:
    """What to write if the broken ones of these clauses are meant to be broken; empty if there is nothing."""
    return remedy([clause.name for clause in clauses if clause.verdict == "BROKEN"])


@dataclass(frozen=True)
class Contract:
    """The clauses of a kernel; after a broken shape the others are not checked."""

    kernel: str
    clauses: tuple[Clause, ...]

    @property
    def passed(self) -> bool:
        """Every clause is kept, or broken as declared."""
        return all(clause.verdict != "BROKEN" for clause in self.clauses)

    @property
    def title(self) -> str:
        """The kernel and the verdict."""
        return f"{self.kernel}: {'keeps' if self.passed else 'BREAKS'} the contract"

    @property
    def remedy(self) -> str:
        """What to write if the broken clauses are meant to be broken."""
        return advice(self.clauses)

    def __repr__(self) -> str:
        """A line for each clause, and what to do about broken ones."""
        last = [f"  {line}" for line in (self.remedy,) if line]
        return "\n".join([self.title, *map(str, self.clauses), *last])

    def _repr_html_(self) -> str:
        """A table, for a notebook."""
        rows = [(one.verdict, one.name, one.found) for one in self.clauses]
        return cell.table(self.title, ("verdict", "clause", "what it demands, or what breaks it"), rows)


def check_attention(
    kernel: Kernel,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layer: int = 0,
    *,
    clauses: Collection[str] = tuple(CLAUSES),
    longest: int = SIZES[-1][1],
) -> Contract:
    """Check a kernel on every clause of the contract, with random queries, keys and values.

    Clauses that the kernel declares broken (`breaks`) are checked too.

    Args:
        kernel: the kernel to check.
        heads: H, query heads.
        kv_heads: K.
        head_dim: D.
        layer: the layer that the kernel is told it is in.
        clauses: the clauses to check.
        longest: the most tokens that a text has: long texts take most of the time.

    Raises:
        InputError: H is no multiple of K, there is no such clause, or the kernel refuses its settings.
    """
    if heads % kv_heads:
        raise InputError(f"check_attention: {heads} query heads cannot share {kv_heads} KV heads evenly")
    if unknown := set(clauses) - set(CLAUSES):
        raise InputError(f"clauses: expected some of {', '.join(CLAUSES)}, got {min(unknown)!r}")
    trial = Trial(undeclared(kernel), heads, kv_heads, head_dim, layer)
    declared = broken_clauses(kernel)
    found: list[Clause] = []
    for name, (check, sizes) in CHECKS.items():
        if name not in clauses:
            continue
        example = _first(trial, check, [size for size in sizes if size[1] <= longest] or sizes)
        verdict = "kept" if example is None else "declared" if name in declared else "BROKEN"
        found.append(Clause(name, CLAUSES[name], name in declared, example, verdict))
        if name == "shape" and example is not None:
            break
    return Contract(kernel_name(kernel), tuple(found))


def require_contract(
    name: str, kernel: Kernel, clauses: Collection[str], heads: int, kv_heads: int, head_dim: int
) -> None:
    """Raise InputError if a kernel breaks one of these clauses without declaring it."""
    contract = check_attention(kernel, heads, kv_heads, head_dim, clauses=clauses)
    for clause in contract.clauses:
        if clause.verdict == "BROKEN":
            advice = f"; {contract.remedy}" if contract.remedy else ""
            raise InputError(f"{name}: {clause.name}: {clause.example}{advice}")


def _first(trial: Trial, check: Check, sizes: Sequence[tuple[int, int]]) -> str | None:
    """The first example that breaks a clause, an exception included."""
    for B, T in sizes:
        try:
            if (example := next(check(trial, B, T), None)) is not None:
                return f"T={T}: {example}"
        except InputError:
            raise
        except Exception as error:
            return f"T={T}: {_located(error, trial.kernel)}"
    return None


def _located(error: Exception, kernel: Kernel) -> str:
    """The error and where it happened: in the kernel's own file, rather than deep inside PyTorch."""
    code = kernel_code(kernel)
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if code and frame.filename == code.co_filename] or frames)[-1]
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message} ({last.filename}:{last.lineno}: {last.line})"
