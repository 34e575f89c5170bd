"""What `make parity` compares: which models, in which dtypes, on which texts, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

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

# Widest first: the random shape is rounded from one to the next.
DTYPES = ("float64", "float32", "bfloat16", "float16")
SHAPE_POSITIONS = 128

Texts = dict[str, list[int]]


@dataclass(frozen=True)
class Extent:
    """How much is compared.

    Attributes:
        dtypes: of weights and activations.
        positions: of each bundled text.
        long: of the English one once more, in float32: nearly TinyLlama's context of 2,048; 0 leaves it out.
        prompts: how many are continued.
        greedy_ids: how many tokens each greedy continuation has.
        seeds: how many samples are drawn under each of the settings.
        sampled_ids: how many tokens each sample has.
        gradients: whether the gradient of every weight is compared.
    """

    dtypes: tuple[str, ...]
    positions: int
    long: int
    prompts: int
    greedy_ids: int
    seeds: int
    sampled_ids: int
    gradients: bool


FULL = Extent(
    DTYPES, positions=256, long=2040, prompts=10, greedy_ids=40, seeds=20, sampled_ids=8, gradients=True
)
# More positions than matvec.c takes at once: the rest of each text goes through it; see `fast.pieces`.
LARGE = Extent(DTYPES, positions=40, long=0, prompts=2, greedy_ids=6, seeds=1, sampled_ids=3, gradients=False)
QUICK = Extent(
    ("float32", "bfloat16"),
    positions=64,
    long=0,
    prompts=4,
    greedy_ids=8,
    seeds=2,
    sampled_ids=4,
    gradients=False,
)
# A model with more parameters than this is large: memory and minutes.
LARGE_PARAMETERS = 500_000_000


class Subject(Protocol):
    """A model to be compared."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def parameters(self) -> int:
        """How many it has."""

    @property
    def trained(self) -> bool:
        """Whether its weights mean something: what rounding them does to a random model says nothing."""

    def model(self, dtype: str) -> Llama:
        """The model in that dtype; asked for from the widest to the narrowest, one at a time."""

    def texts(self, extent: Extent) -> Texts:
        """Ids by text."""

    def long_text(self, extent: Extent) -> list[int]:
        """Ids that nearly fill the context; none where the extent has none."""

    def prompts(self) -> list[list[int]]:
        """Ids to be continued."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, on the bundled texts or on given ones.

    Attributes:
        name: as it is called in the results.
        folder: the checkpoint.
        tokenizer: its tokenizer.
        own_texts: given ones, by name; None takes the bundled ones.
        official: whether it is the model of the seed notebook.
        device: where it runs.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    own_texts: Mapping[str, str] | None = None
    official: bool = False
    device: str = "cpu"
    trained: ClassVar[bool] = True

    @property
    def parameters(self) -> int:
        """From its config."""
        return sum(read_config(self.folder).parameters.values())

    def model(self, dtype: str) -> Llama:
        """Load it; float64 holds float32's weights, so that one truth serves both."""
        stored = "float32" if dtype == "float64" else dtype
        return load_model(self.folder, device=self.device, dtype=stored).to(getattr(torch, dtype))

    def texts(self, extent: Extent) -> Texts:
        """Cut to the extent, a text of one's own to the context.

        Raises:
            InputError: a text has too few tokens for a next one.
        """
        if self.own_texts is None:
            length = min(extent.positions, self._context)
            return {name: texts.encoded(self.tokenizer, name, length) for name in texts.NAMES}
        own = {name: self.tokenizer.encode(text)[: self._context] for name, text in self.own_texts.items()}
        for name, ids in own.items():
            if len(ids) < 2:
                raise InputError(
                    f"{name}: expected a text of 2 tokens at least, got {len(ids)}; give more text"
                )
        return own

    def long_text(self, extent: Extent) -> list[int]:
        """More of the English text."""
        length = min(extent.long, self._context)
        return [] if self.own_texts else texts.encoded(self.tokenizer, "english", length)

    @property
    def _context(self) -> int:
        return read_config(self.folder).max_position_embeddings

    def prompts(self) -> list[list[int]]:
        """The same for every model."""
        return [self.tokenizer.encode(prompt) for prompt in PROMPTS]


class Shape:
    """A shape with random unit-gain weights, drawn once and then rounded from one dtype to the next."""

    trained = False

    def __init__(self, name: str, config: LlamaConfig, device: str = "cpu") -> None:
        self.name, self._config, self._device = name, config, device
        self._model: Llama | None = None

    @property
    def parameters(self) -> int:
        """From its config."""
        return sum(self._config.parameters.values())

    def model(self, dtype: str) -> Llama:
        """The one model, in place."""
        if self._model is None:
            with torch.device("meta"):
                model = Llama(self._config)
            self._model = unit_gain_(model.to_empty(device="cpu")).eval().to(self._device)
        return self._model.to(getattr(torch, dtype))

    def texts(self, extent: Extent) -> Texts:
        """Random ids."""
        return {"random ids": random_ids(SHAPE_POSITIONS, self._config.vocab_size)}

    def long_text(self, extent: Extent) -> list[int]:
        """None: random weights read nothing."""
        return []

    def prompts(self) -> list[list[int]]:
        """Random ids."""
        return [random_ids(8, self._config.vocab_size, seed) for seed in range(len(PROMPTS))]
