"""What a model writes, greedily, and where another one writes something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinyllama.generation import generate
from tinyllama.lab.clauses import broken_clauses
from tinyllama.model import Llama


@torch.inference_mode()
def continuation(model: Llama, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy ids; by whole passes, without a cache, where a kernel declares that it breaks "cache"."""
    if can_cache(model):
        return generate(model, [ids], max_new_tokens=new_tokens)[0]
    text, device = list(ids), model.embed_tokens.weight.device
    for _ in range(new_tokens):
        hidden = model.hidden_states(torch.tensor([text], device=device))
        text.append(int(model.lm_head(hidden[:, -1]).argmax()))
        if text[-1] in model.config.eos_ids:
            break
    return text[len(ids) :]


def can_cache(model: Llama) -> bool:
    """Whether no kernel of the model declares that it breaks "cache"."""
    return not any("cache" in broken_clauses(attention.kernel) for attention in model.attentions)


def first_difference(ids: Sequence[int], others: Sequence[int]) -> int | None:
    """The first place where two continuations differ, one's end included; None where they are the same."""
    for place, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return place
    return None if len(ids) == len(others) else min(len(ids), len(others))
