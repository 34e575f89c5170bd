"""Which well-known mistake gives these values? Each suspect is a formula that is tried, not a guess.

Where a value diverges, the values that went into it are known. So every mistake is computed in float64 from
the same inputs, numbers (eps, RoPE's theta, the scale of the scores) are fitted, and a suspect is named only
where it explains the observed values at least ten times better than the right formula does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tinyllama.parity import attention_mistakes, mistakes
from tinyllama.parity.scene import Scene, Suspects, relative_error

# The error that a suspect leaves, as a share of the error that the right formula leaves.
EXPLAINED = 0.1
# A later suspect must be this much better than an earlier one: some are special cases of one another.
BETTER = 0.5

# By the last part of the address.
FORMULAS: dict[str, Callable[[Scene], Suspects]] = {
    "embed_tokens": mistakes.embedding,
    "input_layernorm": mistakes.norm,
    "post_attention_layernorm": mistakes.norm,
    "norm": mistakes.norm,
    **dict.fromkeys(mistakes.FACTORS, mistakes.linear),
    "q_rot": attention_mistakes.rope,
    "k_rot": attention_mistakes.rope,
    "scores": attention_mistakes.scores,
    "pattern": attention_mistakes.pattern,
    "z": attention_mistakes.attended,
    "product": mistakes.product,
}


def formulas(scene: Scene) -> Suspects:
    """All that is tried at a place: the right formula under the name "", then one per mistake."""
    block = scene.address.startswith("layers.") and scene.address.count(".") == 1
    return mistakes.block(scene) if block else FORMULAS[scene.name](scene)


def suspect(scene: Scene) -> str | None:
    """Name the mistake that explains the value, or None where no known one does, or its inputs are unseen."""
    found, least = None, math.inf
    try:
        for name, value in formulas(scene):
            error = relative_error(scene.observed, value)
            if name == "":
                least = EXPLAINED * error
                if value.shape != scene.observed.shape:
                    break
            elif error < least:
                found, least = name, BETTER * error
    except KeyError:  # an input that was not seen: what was tried before it counts
        pass
    return found
