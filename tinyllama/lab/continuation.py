"""What a model writes greedily, and where a changed one writes something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinyllama.generation import generate
from tinyllama.lab.clauses import broken_clauses
from tinyllama.model import Llama


@dataclass(frozen=True)
class Continuation:
    """A prompt's greedy continuation, compared with the unchanged model's.

    Attributes:
        prompt: its name.
        ids: the new ids.
        parts_at: the first place where the ids differ, the end of one included; None if they are the same.
        same: the text up to there.
        rest: the text from there.
    """

    prompt: str
    ids: list[int]
    parts_at: int | None
    same: str
    rest: str

    @staticmethod
    def of(
        name: str, prompt: Sequence[int], ids: list[int], own: list[int], decode: Callable[[list[int]], str]
    ) -> Continuation:
        """Compare ids with the unchanged model's own."""
        parts_at = first_difference(ids, own)
        # Decoded together with the prompt, which decides about the first space.
        start = len(decode([*prompt]))
        whole = same = decode([*prompt, *ids])[start:]
        if parts_at is not None:  # half a character is not the same yet
            same = decode([*prompt, *ids[:parts_at]])[start:].rstrip("\ufffd")
        return Continuation(name, ids, parts_at, same, whole[len(same) :])

    def split(self, whole: str) -> tuple[str, str]:
        """The unchanged model's text, up to where this one parts from it and from there."""
        return (self.same, whole[len(self.same) :]) if whole.startswith(self.same) else ("", whole)


@torch.inference_mode()
def continuation(model: Llama, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy ids; by passes over the whole text if a kernel declares that it breaks "cache"."""
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
    """The first place where two continuations differ, the end of one included; None if they are the same."""
    for place, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return place
    return None if len(ids) == len(others) else min(len(ids), len(others))
