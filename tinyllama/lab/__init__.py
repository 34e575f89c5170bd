"""The attention lab: change attention in ten lines, and see what it did.

`check_attention` tries a kernel on every clause of the contract, `python scripts/lab.py`
measures it in a model too; docs/attention-lab.md shows how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllama.lazy import lazily

if TYPE_CHECKING:
    from tinyllama.lab.change import Change
    from tinyllama.lab.clauses import CLAUSES, breaks
    from tinyllama.lab.contract import check_attention
    from tinyllama.lab.healing import heal, load_healed, save_healed
    from tinyllama.lab.interpretation import (
        activation_patching,
        direct_logit_attribution,
        head_scores,
        logit_lens,
    )
    from tinyllama.lab.kernel_file import VARIANTS, load_kernel

__all__ = [
    "CLAUSES",
    "VARIANTS",
    "Change",
    "activation_patching",
    "breaks",
    "check_attention",
    "direct_logit_attribution",
    "head_scores",
    "heal",
    "load_healed",
    "load_kernel",
    "logit_lens",
    "save_healed",
]

_PLACES = {
    "change": ["Change"],
    "clauses": ["CLAUSES", "breaks"],
    "contract": ["check_attention"],
    "healing": ["heal", "load_healed", "save_healed"],
    "interpretation": ["activation_patching", "direct_logit_attribution", "head_scores", "logit_lens"],
    "kernel_file": ["VARIANTS", "load_kernel"],
}

__getattr__ = lazily(__name__, _PLACES)
