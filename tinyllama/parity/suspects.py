"""Which well-known mistake explains a value that diverges.

The values that went into it are known, so every mistake is computed from them in float64; eps, theta and the
scale of the scores are fitted. A suspect is named only where the error that it leaves is less than a tenth of
what the right formula leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from tinyllama.parity import attention_mistakes, mistakes
from tinyllama.parity.scene import Scene, Suspects, relative_error

# A suspect may leave at most this share of the error that the right formula leaves.
EXPLAINED = 0.1
# A later suspect must leave at most this share of the error of an earlier one, which may be a special case.
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
    """The right formula of a place under the name "", then one formula per mistake."""
    block = scene.address.startswith("layers.") and scene.address.count(".") == 1
    return mistakes.block(scene) if block else FORMULAS[scene.name](scene)


def suspect(scene: Scene) -> str | None:
    """Name the mistake that explains the value; None where no known one does or its inputs are not known."""
    return explained(formulas(scene), scene.observed)


def explained(suspects: Suspects, observed: Tensor) -> str | None:
    """Name the mistake whose formula gives this value, if one does; the right formula comes first."""
    found, least = None, math.inf
    try:
        for name, value in suspects:
            error = relative_error(observed, value)
            if name == "":
                least = EXPLAINED * error
                if value.shape != observed.shape:
                    break
            elif error < least:
                found, least = name, BETTER * error
    except KeyError:  # an input is not known; what was found before that counts
        pass
    return found
