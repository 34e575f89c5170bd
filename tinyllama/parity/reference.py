"""transformers' Llama over the model's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from tinyllama.config import LlamaConfig
from tinyllama.model import Llama


class Right(Protocol):
    """What the oracle and a search read of a model whose weights are right, such as a `Llama`."""

    @property
    def config(self) -> LlamaConfig:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its activations, which is the one under test."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights, under the names of checkpoints less `model.`."""


def config_fields(config: LlamaConfig) -> dict[str, Any]:
    """The config as the fields of config.json, in transformers 4's spelling."""
    fields = asdict(config)
    if config.rope_scaling is not None:
        fields["rope_scaling"]["rope_type"] = config.rope_scaling.rope_type
    return fields


def reference_model(model: Llama, attention: str) -> transformers.PreTrainedModel:
    """Make transformers' model of our model's tensors: no copy, the same dtype and device.

    It is transformers' Mistral where there is a sliding window, which its Llama does not know.

    Args:
        model: ours.
        attention: "eager" or "sdpa".
    """
    fields = config_fields(model.config)
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    mistral = model.config.sliding_window is not None
    kind = transformers.MistralConfig if mistral else transformers.LlamaConfig
    config = kind(**fields, rope_parameters=rope, attn_implementation=attention)
    with torch.device("meta"):
        reference = (transformers.MistralForCausalLM if mistral else transformers.LlamaForCausalLM)(config)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    reference.load_state_dict(state, strict=True, assign=True)
    reference.tie_weights()
    # Its buffers are empty after the meta device, and must be float32 whatever the weights are.
    rotary = reference.model.rotary_emb
    device = model.embed_tokens.weight.device
    reference.model.rotary_emb = type(rotary)(config).to(device)
    return reference.eval()
