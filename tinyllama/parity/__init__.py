"""Is it right? An independent float64 oracle, and judges that measure against it.

`compare` judges the logits of any two callables, `bisect` names the first operation that diverges, and
`python scripts/parity.py` does both for this project's own model; docs/different-logits.md shows how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllama.lazy import lazily

if TYPE_CHECKING:
    from tinyllama.parity.comparison import Comparison, compare, kernel_run, reference_run
    from tinyllama.parity.divergence import Divergence, bisect
    from tinyllama.parity.measure import Difference, Verdict, difference, judge
    from tinyllama.parity.oracle import oracle_logits
    from tinyllama.parity.reference import config_fields, reference_model

__all__ = [
    "Comparison",
    "Difference",
    "Divergence",
    "Verdict",
    "bisect",
    "compare",
    "config_fields",
    "difference",
    "judge",
    "kernel_run",
    "oracle_logits",
    "reference_model",
    "reference_run",
]

_PLACES = {
    "comparison": ["Comparison", "compare", "kernel_run", "reference_run"],
    "divergence": ["Divergence", "bisect"],
    "measure": ["Difference", "Verdict", "difference", "judge"],
    "oracle": ["oracle_logits"],
    "reference": ["config_fields", "reference_model"],
}

__getattr__ = lazily(__name__, _PLACES)
