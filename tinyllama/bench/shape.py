"""A checkpoint of any shape with random weights: speed does not depend on what a model has learned."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tinyllama.config import LlamaConfig
from tinyllama.model import Llama

STD = 0.02


def write_random_checkpoint(config: LlamaConfig, folder: Path) -> Path:
    """Write a checkpoint of that shape with small normal weights, in bfloat16 as TinyLlama's; its folder."""
    import transformers

    from tinyllama.parity.reference import config_fields

    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        (name if name.startswith("lm_head") else f"model.{name}"): torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, STD, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = config_fields(config) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fields["transformers_version"] = transformers.__version__
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder
