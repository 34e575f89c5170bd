"""Who is measured: our model in each weight mode, transformers and llama.cpp, all on one checkpoint.

Where there are several ranks, also our model as they share it.

Importing this module imports none of them: `--help` is instant, and a load can be timed from its imports on.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tinyllama.errors import InputError
from tinyllama.parallel.plan import MODES as SPLITS

if TYPE_CHECKING:
    from tinyllama import LlamaConfig

MODES = ("exact", "stored", "float32", "bfloat16", "float16", "int8")
# Exact, with decode steps recorded as a CUDA graph.
GRAPH = "graph"
# The part after the hyphen is the dtype, for llama.cpp the kind of the GGUF file.
NAMES = (*MODES, GRAPH, "transformers-float32", "transformers-bfloat16", "llama.cpp-F16", "llama.cpp-Q8_0")
# Our model in a weight mode, shared by all ranks in a split.
ON_RANKS = tuple(f"{mode}-{split}" for mode in MODES for split in SPLITS)
# Of a bfloat16 checkpoint `bfloat16` is the same as `stored`; with `float32` too, 24 GB would not hold all.
DEFAULT = tuple(name for name in NAMES if name not in ("float32", "bfloat16", "float16", GRAPH))
DEFAULT_ON_GPU = ("exact", GRAPH, "transformers-float32", "transformers-bfloat16")
DEFAULT_ON_RANKS = ("stored", *(f"stored-{split}" for split in SPLITS))


@dataclass(frozen=True)
class Setup:
    """What all peers of a run share."""

    folder: str  # the checkpoint
    scratch: str  # a folder for files made from it
    device: str  # of our model and transformers; llama.cpp runs on the CPU only
    dtype: str  # of our model's activations
    context: int  # tokens of the longest text
    threads: int  # of a peer in one process
    ranks_here: int = 1  # on this machine; they share these threads
    pipeline: int = 1  # stages of layers among which the ranks are divided


class Peer(Protocol):
    """An implementation on one checkpoint. Making one imports its libraries, `load` reads the weights."""

    name: str  # one of NAMES or ON_RANKS
    batches: bool  # whether it can decode several texts at once
    weight_bytes: int  # of the weights that a decode step reads
    cached_bytes: int  # of the keys and values of one token

    def load(self) -> None:
        """Load the checkpoint.

        Raises:
            InputError: the peer cannot take part, and why.
        """

    def prefill(self, length: int) -> int:
        """Compute a prompt of `length` tokens in an empty cache; returns the most likely next id."""

    def decode(self, context: int, steps: int) -> Iterator[int]:
        """Decode greedily after `context` tokens, which only the first call computes; one id a step."""

    def batch(self, rows: int, steps: int) -> None:
        """Decode `steps` tokens of each of `rows` texts at once; each text begins with one token."""


def make_peer(name: str, setup: Setup) -> Peer:
    """The peer of that name, not loaded yet.

    Raises:
        InputError: its library is not installed.
    """
    if name in (*MODES, GRAPH):
        from tinyllama.bench.torch_peers import Ours

        return Ours(name, setup)
    if name.startswith("transformers"):
        require("transformers", "pip install transformers")
        from tinyllama.bench.torch_peers import Transformers

        return Transformers(name, setup)
    require("llama_cpp", 'pip install "tinyllama[bench]"')
    from tinyllama.bench.llama_cpp import LlamaCpp

    return LlamaCpp(name, setup)


def require(package: str, command: str) -> None:
    """Raise InputError, with the command that installs it, if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed: {command}")


def random_ids(setup: Setup, config: LlamaConfig) -> list[int]:
    """A text without meaning that fills the context; always the same."""
    return random.Random(0).choices(range(config.vocab_size), k=setup.context)


def cached_bytes(config: LlamaConfig, itemsize: int) -> int:
    """What a cache keeps of one token: a key and a value for each layer and KV head."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
