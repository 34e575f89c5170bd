"""Equal to transformers to the last bit: eager attention in float32, whole, in chunks, and step by step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.shapes import ROPE_SCALINGS
from tinyllama.attention import eager
from tinyllama.checkpoints.config_file import config_from_dict
from tinyllama.checkpoints.storage import Storage, speed_up
from tinyllama.model import Llama
from tinyllama.parity.fixture import unit_gain_
from tinyllama.parity.reference import reference_model

T = 40
SPLITS = {"one pass": [T], "chunks": [17, 5, 18], "a prompt and steps": [30, *[1] * 10]}


def some_model(seed: int, **changes: Any) -> Llama:
    """A model of random sizes as it is loaded with exact weights, small and odd ones among them."""
    draw = random.Random(seed).choice
    K, G = draw([1, 2, 3, 4]), draw([1, 2, 3, 4])
    fields = {
        "model_type": "llama",
        "vocab_size": draw([50, 97, 320]),
        "hidden_size": K * G * draw([1, 2, 4, 8, 16]),
        "intermediate_size": draw([8, 24, 40, 64, 100, 176, 192]),
        "num_hidden_layers": draw([1, 2, 3]),
        "num_attention_heads": K * G,
        "num_key_value_heads": K,
        "head_dim": draw([2, 4, 6, 8, 10, 16, 32, 64]),
    }
    model = unit_gain_(Llama(config_from_dict(fields | changes))).eval()
    model.set_attention(eager)
    # Splitting the rows of W for speed had cost the bits of decode steps, for rows of 24 columns and fewer.
    speed_up(model, Storage("exact", torch.float32).claims([]), all_threads=True)
    return model


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_every_logit_is_the_same_float(seed: int):
    compare(some_model(seed), seed)


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
@torch.no_grad()
def test_every_logit_of_a_stretched_context_is_the_same_float(kind: str):
    model = some_model(0, head_dim=16, rope_scaling=ROPE_SCALINGS[kind], max_position_embeddings=24)
    compare(model, seed=0)


def compare(model: Llama, seed: int) -> None:
    """Whole, in chunks and in steps, with a random text."""
    ids = torch.randint(0, model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(seed))
    for name, sizes in SPLITS.items():
        # A fresh one each time: its dynamic RoPE remembers the longest text.
        reference = reference_model(model, "eager")
        cache, theirs = model.new_cache(1, T), None
        for part in ids.split(sizes, dim=1):
            expected = reference(part, past_key_values=theirs, use_cache=True)
            theirs = expected.past_key_values
            assert torch.equal(model(part, cache), expected.logits), name
