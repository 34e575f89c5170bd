"""A checkpoint with random weights: speed does not depend on what a model has learned."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from tinyllama import Llama, LlamaConfig


def write_random_checkpoint(config: LlamaConfig, folder: Path) -> None:
    """Write a checkpoint of that shape: bfloat16 as TinyLlama's, matrices with std 0.02, norm weights 1."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            values.normal_(0, 0.02, generator=generator)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = asdict(config) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
