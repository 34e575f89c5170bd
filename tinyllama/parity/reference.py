"""transformers' Llama over the model's own weights, and random weights that hide no bug."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor

from tinyllama.config import LlamaConfig
from tinyllama.model import Llama


def config_fields(config: LlamaConfig) -> dict[str, Any]:
    """The config as the fields of config.json, in transformers 4's spelling."""
    fields = asdict(config)
    if config.rope_scaling is not None:
        fields["rope_scaling"]["rope_type"] = "llama3"
    return fields


def reference_model(model: Llama, attention: str) -> transformers.LlamaForCausalLM:
    """The model of transformers over the very tensors of ours: the same dtype and device, no copy.

    Args:
        model: ours.
        attention: "eager" or "sdpa".
    """
    fields = config_fields(model.config)
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    config = transformers.LlamaConfig(**fields, rope_parameters=rope, attn_implementation=attention)
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    reference.load_state_dict(state, strict=True, assign=True)
    # Made on the meta device it is empty; and it must be float32 whatever the weights are.
    rotary = reference.model.rotary_emb
    device = model.embed_tokens.weight.device
    reference.model.rotary_emb = type(rotary)(config).to(device)
    return reference.eval()


def unit_gain_(model: Llama, seed: int = 0) -> Llama:
    """Fill a model with random weights under which every operation matters, in place.

    Matrices have unit gain (std 1/sqrt(fan_in)), embeddings std 0.003, norm weights are from U(0.1, 2.1).
    With the usual std of 0.02 attention and norms hardly act: a missing RoPE passed at 1e-2.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if "norm" in name:
            return torch.empty(shape).uniform_(0.1, 2.1, generator=generator)
        std = 0.003 if name.startswith("embed") else shape[1] ** -0.5
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape))
    return model
