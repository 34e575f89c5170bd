"""Whether we choose the ids that transformers chooses: greedy and with a seed, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from tinyllama.generation import generate
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity.measure import FLIP_MARGIN, difference
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.sampler import Sampler, repetition_penalty

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 40, "top_p": 1.0, "repetition_penalty": 1.2},
]


@dataclass(frozen=True)
class IdFlip:
    """The first id in which a continuation differs from transformers'.

    Attributes:
        settings: of the sampler, and the seed; empty is greedy.
        prompt: which one of the batch.
        step: how many new ids came before.
        expected: transformers' id there.
        chosen: ours.
        margin: by how much the oracle prefers one to the other, in logits; with a seed, after the same draw.
        limit: the margin under which rounding may decide: 6 RMS errors of transformers' logits.
    """

    settings: dict[str, Any]
    prompt: int
    step: int
    expected: int
    chosen: int
    margin: float
    limit: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin <= self.limit


@dataclass(frozen=True)
class Continuations:
    """Some calls of `generate`, beside the same calls of transformers.

    Attributes:
        model: its name.
        dtype: of its weights and activations.
        what: the kind of call.
        calls: how many.
        ids: how many new ids were compared.
        flips: the first difference of each continuation that has one.
    """

    model: str
    dtype: str
    what: str
    calls: int
    ids: int
    flips: list[IdFlip]

    @property
    def failures(self) -> list[str]:
        """Differences that rounding does not explain."""
        return [
            f"prompt {flip.prompt}, new token {flip.step}: expected {flip.expected}, got {flip.chosen}; "
            f"the oracle's margin {flip.margin:.2e} is over {flip.limit:.2e}"
            for flip in self.flips
            if not flip.near_tie
        ]


def reference_ids(
    reference: transformers.LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    count: int,
    seed: int | None = None,
    **settings: Any,
) -> list[list[int]]:
    """New ids by transformers' `generate`, never ended by EOS; prompts are padded on the left.

    The global random state is as it was before.
    """
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (length - pad) for pad in padding]
    device = reference.device
    sampling = {"do_sample": True, **settings} if settings else {"do_sample": False}
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        out = reference.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=count,
            pad_token_id=0,
            eos_token_id=None,
            **sampling,
        )
    return out[:, length:].tolist()


def compare_continuations(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    count: int,
    seed: int | None = None,
    attention: str = "sdpa",
    ours: Callable[..., list[list[int]]] = generate,
    **settings: Any,
) -> list[IdFlip]:
    """Continue the prompts in one batch, by our `generate` and by transformers'.

    Args:
        model: attends by the kernel of that name.
        prompts: ids of each.
        count: new ids for each.
        seed: of both samplers.
        attention: transformers', "eager" or "sdpa".
        ours: generates with our model.
        settings: of the sampler, the same names for both; none is greedy.

    Returns:
        The first difference of each continuation that has one.
    """
    model.set_attention(KERNELS[attention])
    reference = reference_model(model, attention)
    mine = ours(model, prompts, max_new_tokens=count, eos_ids=(), seed=seed, **settings)
    theirs = reference_ids(reference, prompts, count, seed, **settings)
    sampler = Sampler(seed=seed, **settings)
    known = settings if seed is None else {**settings, "seed": seed}
    flips = []
    for row, (got, expected) in enumerate(zip(mine, theirs, strict=True)):
        if got != expected:
            step = [a == b for a, b in zip(got, expected, strict=True)].index(False)
            prefix = [*prompts[row], *expected[:step]]
            truth, rounding = truth_and_rounding(model, reference, prefix)
            scores = draw_scores(sampler, truth, prefix, step, row, len(prompts))
            margin = (scores[expected[step]] - scores[got[step]]).abs().item()
            limit = FLIP_MARGIN * rounding
            flips.append(IdFlip(known, row, step, expected[step], got[step], margin, limit))
    return flips


@torch.no_grad()
def truth_and_rounding(
    model: Llama, reference: transformers.LlamaForCausalLM, ids: Sequence[int]
) -> tuple[Tensor, float]:
    """The oracle's logits for the next token, (V,), and the RMS error of transformers' on the text."""
    truth = oracle_logits(config_fields(model.config), model.state_dict(), ids)
    logits = reference(torch.tensor([list(ids)], device=reference.device)).logits[0]
    return truth[-1], difference(logits, truth).rms


def draw_scores(
    sampler: Sampler, logits: Tensor, ids: Sequence[int], step: int, row: int, rows: int
) -> Tensor:
    """The scores, in logits, whose largest the sampler chooses, (V,).

    Args:
        sampler: greedy, or with a seed.
        logits: the oracle's for the next token, (V,).
        ids: the text so far.
        step: how many new tokens it has.
        row: which row of the batch it is.
        rows: how many rows the batch has, which each step draws for.
    """
    seen = torch.zeros(1, len(logits), dtype=torch.bool, device=logits.device)
    seen[0, list(ids)] = True
    if sampler.greedy:
        return repetition_penalty(logits[None], seen, sampler.repetition_penalty)[0]
    # The draw is argmax(probabilities / e), where e is exponential: one for each step, row and token.
    generator = sampler.generator(logits.device)
    for _ in range(step + 1):
        draw = torch.empty(rows, len(logits), device=logits.device).exponential_(1, generator=generator)
    probabilities = sampler.probabilities(logits[None], seen)[0].to(torch.float64)
    return sampler.temperature * (probabilities.log() - draw[row].log())
