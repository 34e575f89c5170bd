"""What healing gives: its settings, its state after some steps, the file that keeps it, and its outcome."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinyllama.checkpoints.files import one_line, replace_file
from tinyllama.errors import InputError
from tinyllama.lab.perplexity import Perplexity

KEY = "healing"


@dataclass(frozen=True)
class Settings:
    """How the changed layers are trained, by AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

    Attributes:
        kernel: the name of the change.
        layers: the changed layers, which are trained; None: all.
        heads: the changed query heads; None: all.
        text: the name or digest of the text; another text is another experiment.
        batch: windows of text in a step.
        length: tokens in a window.
        lr: the learning rate.
        seed: decides which windows of the text are read.
    """

    kernel: str
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    text: str
    batch: int = 4
    length: int = 256
    lr: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class Healed:
    """The state of a healing after some steps.

    Attributes:
        settings: how the layers are trained.
        losses: of each step so far, in nats a token.
        weights: the parameters of the changed layers, by name.
        moments: AdamW's running means, by name.
    """

    settings: Settings
    losses: tuple[float, ...]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """Of all bits."""
        found = hashlib.sha256(repr((self.settings, self.losses)).encode())
        for name, tensor in sorted((self.weights | self.moments).items()):
            bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found.update(name.encode() + b"\0" + bits.numpy().tobytes())
        return found.hexdigest()[:12]


@dataclass(frozen=True)
class Outcome:
    """What healing gave.

    Attributes:
        settings: how it was done.
        held_out: tokens of the text that was not trained on, on which perplexity is measured.
        changed: after the change, beside the unchanged model.
        healed: after the training too; None if no step was done.
        losses: of each step, in nats a token.
    """

    settings: Settings
    held_out: int
    changed: Perplexity
    healed: Perplexity | None
    losses: tuple[float, ...]


def save_healed(path: Path, healed: Healed) -> None:
    """Write a state to a new file, which then replaces `path`: no half-written file is left behind.

    Raises:
        InputError: it cannot be written.
    """
    record = {"settings": asdict(healed.settings), "losses": healed.losses}
    tensors = {f"weights.{name}": value for name, value in healed.weights.items()}
    tensors |= {f"moments.{name}": value for name, value in healed.moments.items()}
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    replace_file(path, lambda partial: save_file(tensors, partial, {KEY: json.dumps(record)}))


def load_healed(path: Path) -> Healed:
    """Read what `save_healed` wrote. The kernel that it names is not loaded.

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    try:
        if not path.is_file():
            raise ValueError("no such file")
        with safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()[KEY])
            settings, losses = _settings(record["settings"]), tuple(map(float, record["losses"]))
            parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
            for key in list(file.keys()):
                part, _, name = key.partition(".")
                parts[part][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected a file that heal.py wrote ({one_line(error)}); give another"
        ) from error
    return Healed(settings, losses, parts["weights"], parts["moments"])


def _settings(values: dict[str, Any]) -> Settings:
    """The settings in a file, which can be anything; raises KeyError, TypeError or ValueError then."""
    for places in ("layers", "heads"):
        if values[places] is not None:
            values[places] = tuple(values[places])
            if not all(type(number) is int for number in values[places]):
                raise ValueError(f"{places}: expected numbers")
    settings = Settings(**values)
    kinds = {"kernel": str, "text": str, "batch": int, "length": int, "lr": float, "seed": int}
    for name, kind in kinds.items():
        if type(getattr(settings, name)) is not kind:
            raise ValueError(f"{name}: expected {kind.__name__}, got {getattr(settings, name)!r:.80}")
    return settings
