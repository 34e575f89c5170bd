"""The figures of a scorecard: `dataclasses.asdict` gives its JSON; the tables and the page show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tinyllama.kernels import kernel_name
from tinyllama.lab.continuation import Continuation
from tinyllama.lab.contract import Clause, advice
from tinyllama.lab.perplexity import Perplexity, perplexity
from tinyllama.lab.speed import Speed
from tinyllama.model import Llama
from tinyllama.pages.cell import frame
from tinyllama.parity.measure import Difference
from tinyllama.progress import printed


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        context: tokens of the prompt at which speed and KV memory are measured.
        rounds: of timing; 0: speed is not measured.
        new_tokens: in each continuation.
    """

    context: int = 512
    rounds: int = 3
    new_tokens: int = 32


@dataclass(frozen=True)
class ModelFacts:
    """The model's shape, dtype and own kernels."""

    layers: int
    heads: int
    kv_heads: int
    dtype: str
    kernels: list[str]

    @staticmethod
    def of(model: Llama) -> ModelFacts:
        """The facts of a model."""
        config = model.config
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        kernels = sorted({kernel_name(attention.kernel) for attention in model.attentions})
        shape = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
        return ModelFacts(*shape, dtype, kernels)


@dataclass(frozen=True)
class Prediction(Perplexity):
    """How a text is predicted after a change, beside the unchanged model.

    Attributes:
        text: its name; "all" for all texts together.
        tokens: its length.
        kl_mean: KL(unchanged || changed), in nats, mean over the tokens.
        kl_max: the largest.
        top1: the share of tokens at which the most likely next token is still the same.
    """

    text: str
    tokens: int
    kl_mean: float
    kl_max: float
    top1: float

    @staticmethod
    def of(text: str, parts: Sequence[Difference]) -> Prediction:
        """The prediction of one text or several."""
        whole = Difference.joined(parts)
        worse = perplexity([part.nll for part in parts], [part.truth_nll for part in parts])
        figures = {"kl_mean": whole.kl_mean, "kl_max": whole.kl_max, "top1": whole.top1}
        return Prediction(**asdict(worse), text=text, tokens=len(whole.nll), **figures)


@dataclass(frozen=True)
class Cache:
    """What a KV cache has to keep of a text's first half for its second half.

    Attributes:
        of: tokens of the first half.
        needed: the share of their keys that the second half still reads (see `keys_needed`); None: not known,
            so all are counted.
        kept: bytes that the kernels keep of a token, over those of its keys and values (see `keeps`).
        bytes: for these tokens, by both.
        share: of the bytes of the unchanged model's cache.
    """

    of: int
    needed: float | None
    kept: float
    bytes: int
    share: float


@dataclass(frozen=True)
class Unchanged:
    """The model's own speed (None: not measured) and continuations."""

    speed: Speed | None
    continuations: list[Continuation]


@dataclass(frozen=True)
class Effects:
    """What a change does to predictions and inside the model.

    Attributes:
        texts: how each text is predicted.
        all: how all texts together are predicted.
        layers_changed: relative change of each layer's residual stream, (L,).
        heads_changed: relative change of each head's output with the whole change applied, (L, H).
        heads_direct: relative change of each head's output when that head alone is changed, (L, H).
    """

    texts: list[Prediction]
    all: Prediction
    layers_changed: list[float]
    heads_changed: list[list[float]]
    heads_direct: list[list[float]]


@dataclass(frozen=True)
class Results(Effects):
    """Everything that is measured of a change; speed is None if it was not measured."""

    cache: Cache
    speed: Speed | None
    continuations: list[Continuation]


@dataclass(frozen=True)
class Card:
    """One change.

    Attributes:
        name: of the change.
        layers: that the kernel goes to.
        heads: query heads that it goes to.
        passed: the kernel keeps the contract, or breaks it as declared.
        contract: every clause that was checked.
        results: None if the contract is broken: the figures of a kernel that sees later tokens look too good.
    """

    name: str
    layers: list[int]
    heads: list[int]
    passed: bool
    contract: list[Clause]
    results: Results | None = None

    @property
    def remedy(self) -> str:
        """What to write if the broken clauses are meant to be broken."""
        return advice(self.contract)


@dataclass(frozen=True)
class Scorecard:
    """All changes beside the unchanged model; `dataclasses.asdict` gives plain JSON.

    Attributes:
        machine: what it was measured on.
        model: the model.
        texts: tokens by name.
        extent: how much was measured.
        unchanged: the model's own figures.
        changes: a card for each change.
    """

    machine: dict[str, Any]
    model: ModelFacts
    texts: dict[str, int]
    extent: Extent
    unchanged: Unchanged
    changes: list[Card]

    def __repr__(self) -> str:
        """The tables that lab.py prints."""
        from tinyllama.lab.tables import show  # here, because tables.py imports this file

        return printed(partial(show, card=self))

    def _repr_html_(self) -> str:
        """The page that lab.py writes, for a notebook."""
        from tinyllama.lab.page import page  # here, because page.py imports this file

        return frame("tinyllama scorecard", page(self))
