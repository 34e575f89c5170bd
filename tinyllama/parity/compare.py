"""A model's logits and greedy ids beside those of transformers over the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinyllama.attention import KERNELS, eager
from tinyllama.generation import generate
from tinyllama.model import Llama
from tinyllama.parity.measure import Difference, difference, judge
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.reference import config_fields, reference_model

PROMPT_TOKENS = 8
NEW_TOKENS = 20


@dataclass(frozen=True)
class Row:
    """One implementation's figures.

    Attributes:
        who: whose logits, with which attention.
        measured: their difference from the oracle.
        same_bits: whether every logit equals transformers' with the same attention; None for its own.
        failures: every criterion that is broken.
    """

    who: str
    measured: Difference
    same_bits: bool | None
    failures: tuple[str, ...]


@torch.inference_mode()
def compare_logits(model: Llama, ids: list[int]) -> list[Row]:
    """Judge both kernels' logits on one text, against the oracle and by transformers' own error.

    Args:
        model: on the CPU, in any dtype. The weights are rounded to it for the oracle as well.
        ids: the text, T ids.
    """
    dtype = model.embed_tokens.weight.dtype
    truth = oracle_logits(config_fields(model.config), model.state_dict(), ids)
    batch = torch.tensor([ids])
    theirs = {name: reference_model(model, name)(batch).logits[0] for name in KERNELS}
    references = {name: difference(logits, truth) for name, logits in theirs.items()}
    rows = [Row(f"transformers {name}", measured, None, ()) for name, measured in references.items()]
    for name, kernel in KERNELS.items():
        model.set_attention(kernel)
        logits = model(batch)[0]
        measured = difference(logits, truth)
        verdict = judge(measured, list(references.values()), dtype)
        rows.append(Row(f"tinyllama {name}", measured, torch.equal(logits, theirs[name]), verdict.failures))
    return rows


def compare_greedy(model: Llama, ids: list[int]) -> tuple[list[int], list[int]]:
    """The greedy continuation of the text's start, by our cache and loop and by transformers'.

    Both attend by the textbook kernel, whose decode steps are the same operations: not even a near-tie may
    fall differently, in any dtype but float64, where transformers keeps float32 norms.
    """
    prompt = ids[:PROMPT_TOKENS]
    model.set_attention(eager)
    (ours,) = generate(model, [prompt], max_new_tokens=NEW_TOKENS, eos_ids=())
    theirs = reference_model(model, "eager").generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ours, theirs[0, len(prompt) :].tolist()
