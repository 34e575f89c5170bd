"""What `make parity` compares: which models, in which dtypes, on which texts, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tinyllama.checkpoints.config_file import read_config
from tinyllama.checkpoints.load import load_model
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.parity import texts
from tinyllama.parity.fixture import random_ids, unit_gain_
from tinyllama.parity.texts import PROMPTS
from tinyllama.text.tokenizer import Tokenizer

# Widest first, because the weights of a random shape are rounded from one to the next.
DTYPES = ("float64", "float32", "bfloat16", "float16")
SHAPE_POSITIONS = 128

Texts = dict[str, list[int]]


@dataclass(frozen=True)
class Extent:
    """How much is compared.

    Attributes:
        dtypes: of weights and activations, from the widest to the narrowest.
        positions: of each bundled text.
        prompts: how many are continued.
        greedy_ids: how many tokens each greedy continuation has.
        seeds: how many samples are drawn under each of the settings.
        sampled_ids: how many tokens each sample has.
        long: positions of a longer English text, in float32: nearly TinyLlama's context of 2,048. 0: none.
        gradients: whether the gradient of every weight is compared.
    """

    dtypes: tuple[str, ...]
    positions: int
    prompts: int
    greedy_ids: int
    seeds: int
    sampled_ids: int
    long: int = 0
    gradients: bool = False


FULL = Extent(DTYPES, 256, prompts=10, greedy_ids=40, seeds=20, sampled_ids=8, long=2040, gradients=True)
# More positions than matvec.c takes at once: the rest of each text goes through it; see `fast.pieces`.
LARGE = Extent(DTYPES, 40, prompts=2, greedy_ids=6, seeds=1, sampled_ids=3)
QUICK = Extent(("float32", "bfloat16"), 64, prompts=4, greedy_ids=8, seeds=2, sampled_ids=4)
# Of a model with more parameters than this, only LARGE is compared: more would need much memory and time.
LARGE_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        name: its name in the report.
        folder: the checkpoint.
        tokenizer: its tokenizer.
        own_texts: the user's texts, by name; None takes the bundled ones.
        official: whether it is the model of the seed notebook.
        device: where it runs.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    own_texts: Mapping[str, str] | None = None
    official: bool = False
    device: str = "cpu"
    # Its weights mean something, so the cost of rounding them does.
    trained = True

    @cached_property
    def config(self) -> LlamaConfig:
        """Its shape."""
        return read_config(self.folder)

    def model(self, dtype: str) -> Llama:
        """Load it; float64 holds float32's weights, so that one truth serves both."""
        stored = "float32" if dtype == "float64" else dtype
        return load_model(self.folder, device=self.device, dtype=stored).to(getattr(torch, dtype))

    def texts(self, extent: Extent) -> Texts:
        """The bundled texts, cut to the extent, or the user's, cut to the context.

        Raises:
            InputError: a text has too few tokens for a next one.
        """
        # Not `context`: beyond this, dynamic RoPE turns a step's keys by other angles than a whole text's.
        context = self.config.max_position_embeddings
        if self.own_texts is None:
            length = min(extent.positions, context)
            return {name: texts.encoded(self.tokenizer, name, length) for name in texts.NAMES}
        own = {name: self.tokenizer.encode(text)[:context] for name, text in self.own_texts.items()}
        for name, ids in own.items():
            if len(ids) < 2:
                raise InputError(
                    f"{name}: expected a text of 2 tokens at least, got {len(ids)}; give more text"
                )
        return own

    def long_text(self, extent: Extent) -> list[int]:
        """More of the English text; empty where the user gave texts."""
        length = min(extent.long, self.config.max_position_embeddings)
        return [] if self.own_texts else texts.encoded(self.tokenizer, "english", length)

    def prompts(self) -> list[list[int]]:
        """The ids of the bundled beginnings."""
        return [self.tokenizer.encode(prompt) for prompt in PROMPTS]


class Shape:
    """A shape with random unit-gain weights, drawn once and then rounded from one dtype to the next."""

    trained = False

    def __init__(self, name: str, config: LlamaConfig, device: str = "cpu") -> None:
        self.name, self.config, self._device = name, config, device
        self._model: Llama | None = None

    def model(self, dtype: str) -> Llama:
        """The one model, in place; ask from the widest dtype to the narrowest."""
        if self._model is None:
            with torch.device("meta"):
                model = Llama(self.config)
            self._model = unit_gain_(model.to_empty(device="cpu")).eval().to(self._device)
        return self._model.to(getattr(torch, dtype))

    def texts(self, extent: Extent) -> Texts:
        """Random ids."""
        return {"random ids": random_ids(SHAPE_POSITIONS, self.config.vocab_size)}

    def long_text(self, extent: Extent) -> list[int]:
        """Empty: random weights read nothing."""
        return []

    def prompts(self) -> list[list[int]]:
        """Random ids."""
        return [random_ids(8, self.config.vocab_size, seed) for seed in range(len(PROMPTS))]


Subject = Checkpoint | Shape
