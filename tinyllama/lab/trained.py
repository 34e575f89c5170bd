"""The folder of a model trained from scratch: a checkpoint, and the state from which training goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinyllama.checkpoints.files import SINGLE, one_line, read_json, replace_file, replace_text
from tinyllama.errors import InputError
from tinyllama.kernels import kernel_name
from tinyllama.lab.training import moments, restore
from tinyllama.model import Llama

END = "<|endoftext|>"
# Weights, AdamW's means and the record are one file: a kill between two files would mix two moments.
STATE = "resume.safetensors"
KEY = "training"
CORPUS = "corpus.json"
PLAIN = ("sdpa", "eager")  # the attention of every Llama, of which a checkpoint says nothing


def digest(text: str) -> str:
    """A short name for exactly this text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def byte_tokenizer(text: str, vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer on a text, unless the folder has the one of this text and size.

    Raises:
        InputError: the folder has one of another text or size, or cannot be written.
    """
    asked = {"text": digest(text), "vocab_size": vocab_size}
    if (folder / CORPUS).exists():
        if read_json(folder / CORPUS) != asked:
            raise InputError(f"{folder}: belongs to another --text or --vocab; give another --out")
        return
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([text], trainer)
    replace_text(folder / "tokenizer.json", trained.to_str())
    kept = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "add_prefix_space": False}
    replace_text(folder / "tokenizer_config.json", json.dumps(kept, indent=1) + "\n")
    replace_text(folder / CORPUS, json.dumps(asked) + "\n")  # last: where it is, the others are whole


def is_begun(folder: Path) -> bool:
    """Whether there is a state to go on from."""
    return (folder / STATE).exists()


def keep(
    folder: Path,
    model: Llama,
    optimizer: torch.optim.AdamW,
    experiment: Mapping[str, Any],
    known: Mapping[str, Any],
) -> None:
    """Write the checkpoint, then the state: a state that is at its end has its checkpoint.

    Args:
        folder: has the tokenizer already.
        model: what is trained.
        optimizer: of its weights.
        experiment: what must be the same to go on.
        known: of the run so far; see `resumed`.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        **{name: value for name, value in asdict(model.config).items() if value is not None},
    }
    name = kernel_name(model.attentions[0].kernel)
    if name not in PLAIN:
        config["attention_kernel"] = name
    weights = dict(model.named_parameters())
    values = {key: value.detach().contiguous() for key, value in weights.items()}
    official = {key if key.startswith("lm_head") else f"model.{key}": value for key, value in values.items()}
    replace_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    replace_file(folder / SINGLE, lambda part: save_file(official, part, {"format": "pt"}))
    state = {f"weights.{key}": value for key, value in values.items()}
    state |= {f"moments.{key}": value for key, value in moments(optimizer, weights).items()}
    record = json.dumps({"experiment": experiment, "known": known})
    replace_file(folder / STATE, lambda part: save_file(state, part, {KEY: record}))


def resumed(
    folder: Path, model: Llama, optimizer: torch.optim.AdamW, experiment: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[tuple[int, float], ...], float]:
    """Put weights and means back; returns the losses, the held-out losses and the speed so far.

    Raises:
        InputError: the file is damaged, or of another experiment or model.
    """
    path, weights = folder / STATE, dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()[KEY])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        there, known = record["experiment"], record["known"]
        losses = tuple(map(float, known["losses"]))
        held_out = tuple((int(steps), float(loss)) for steps, loss in known["held_out"])
        speed = float(known["tokens_per_second"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is not a state that train.py wrote ({one_line(error)}); remove it to begin anew"
        ) from error
    # JSON has lists for tuples.
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    same = {name: tuple(value.shape) for name, value in _part(tensors, "weights").items()} == shapes
    if there != json.loads(json.dumps(experiment)) or not same:
        raise InputError(f"{folder}: was trained in another way; give another --out, or the same options")
    with torch.no_grad():
        for name, value in _part(tensors, "weights").items():
            weights[name].copy_(value)
    restore(optimizer, weights, _part(tensors, "moments"), len(losses))
    return losses, held_out, speed


def _part(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")
    }
