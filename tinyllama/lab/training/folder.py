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

from tinyllama.checkpoints.files import SINGLE, one_line, read_bytes, read_json, replace_file, replace_text
from tinyllama.errors import InputError
from tinyllama.kernels import kernel_name, kernel_source
from tinyllama.lab.training.steps import moments, restore
from tinyllama.model import Llama

END = "<|endoftext|>"
# Weights, AdamW's means and the record are one file: a kill between two files would mix two moments.
STATE = "resume.safetensors"
KEY = "training"
CORPUS = "corpus.json"
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PLAIN = ("sdpa", "eager")  # the attention of every Llama, of which a checkpoint says nothing


def digest(text: str) -> str:
    """A short name for exactly this text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_tokenizer(text: str, vocab_size: int, source: Path | None, folder: Path) -> None:
    """Copy the tokenizer of a checkpoint folder, or train a byte-level BPE one on the text.

    Nothing is written if the folder has that tokenizer already.

    Args:
        text: what is learnt from.
        vocab_size: of the tokenizer that is trained.
        source: the checkpoint folder; None: train one.
        folder: where it goes.

    Raises:
        InputError: the folder belongs to another text or tokenizer, or cannot be written.
    """
    files = {name: read_bytes(source / name) for name in FILES if (source / name).exists()} if source else {}
    asked = {"text": digest(text), "vocab_size": vocab_size, "files": _digests(files)}
    if (folder / CORPUS).exists():
        if read_json(folder / CORPUS) != asked:
            raise InputError(
                f"{folder}: belongs to another --text, --vocab or --tokenizer; give another --out"
            )
        return
    for name, data in (files or _byte_level(text, vocab_size)).items():
        _write(folder / name, data)
    replace_text(folder / CORPUS, json.dumps(asked) + "\n")  # last: where it is, the others are whole


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Give a checkpoint folder the tokenizer of another folder."""
    for name in FILES:
        if (source / name).exists():
            _write(folder / name, read_bytes(source / name))


def _byte_level(text: str, vocab_size: int) -> dict[str, bytes]:
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([text], trainer)
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "add_prefix_space": False}
    return {
        "tokenizer.json": trained.to_str().encode(),
        "tokenizer_config.json": f"{json.dumps(settings, indent=1)}\n".encode(),
    }


def _write(path: Path, data: bytes) -> None:
    replace_file(path, lambda partial: partial.write_bytes(data))


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in files.items()}


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
        config["attention_source"] = kernel_source(model.attentions[0].kernel)
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
) -> tuple[tuple[float, ...], tuple[tuple[int, float], ...]]:
    """Put weights and means back; returns the losses and the held-out losses so far.

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
    return losses, held_out


def _part(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")
    }
