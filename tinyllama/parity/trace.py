"""The values inside a forward pass, by address: ours, and those of transformers under the same addresses.

An address is a module path of our model. The oracle knows the same ones (`oracle_logits(..., trace=...)`), so
three implementations can be compared value by value, in the order of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from tinyllama.hooks import hooked
from tinyllama.model import Llama

# Of one layer, in the order in which they are computed.
OPERATIONS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_rot",
    "self_attn.k_rot",
    "self_attn.scores",
    "self_attn.pattern",
    "self_attn.z",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.product",
    "mlp.down_proj",
)

# Address -> value; None where the pass never came there.
Trace = dict[str, Tensor | None]


def stages(layers: int) -> list[str]:
    """The addresses from the embedding to the logits, block by block: a search begins with these."""
    return ["embed_tokens", *(f"layers.{layer}" for layer in range(layers)), "norm", "lm_head"]


def operations(layer: int) -> list[str]:
    """The addresses within one layer, in the order of the computation."""
    return [f"layers.{layer}.{name}" for name in OPERATIONS]


@contextmanager
def watch(model: nn.Module, addresses: Iterable[str]) -> Iterator[Trace]:
    """Collect the outputs of the modules at these paths while the block runs.

    The value is None for a path that does not exist and for a module that is never called.
    """
    seen: Trace = dict.fromkeys(addresses)

    def keep(address: str) -> Callable[[Tensor], None]:
        return lambda value: seen.update({address: value.detach()})

    with hooked(model, {address: keep(address) for address in seen.keys() & dict(model.named_modules())}):
        yield seen


@torch.no_grad()
def our_trace(model: Llama, ids: Sequence[int], addresses: Iterable[str]) -> Trace:
    """Run our model on one text; values have no batch axis, and the model's dtype. Shared, they are whole."""
    with watch(model, addresses) as seen:
        model(torch.tensor([list(ids)], device=model.embed_tokens.weight.device))
    if model.sharing is not None:
        model.sharing.complete(seen, list(seen))
    return _unbatched(seen)


@torch.no_grad()
def reference_trace(
    reference: transformers.LlamaForCausalLM, ids: Sequence[int], addresses: Iterable[str]
) -> Trace:
    """Run transformers' model on one text; its sdpa attention gives no scores and no pattern."""
    wanted = list(addresses)
    theirs = {their_path(address): address for address in wanted}
    with watch(reference, theirs) as outputs, _watch_inside(reference, wanted) as inside:
        reference(torch.tensor([list(ids)], device=reference.device))
    return _unbatched({address: outputs[path] for path, address in theirs.items()} | inside)


def their_path(address: str) -> str:
    """The module path in transformers' model for an address of ours."""
    return address if address == "lm_head" else f"model.{address}"


def _unbatched(seen: Trace) -> Trace:
    return {address: None if value is None else value[0] for address, value in seen.items()}


@contextmanager
def _watch_inside(reference: transformers.LlamaForCausalLM, wanted: list[str]) -> Iterator[Trace]:
    """Collect what no module of transformers gives out: q_rot, k_rot, scores, pattern, z, product."""
    seen: Trace = {}

    def keep(address: str, value: Tensor | None) -> None:
        if address in wanted:
            seen[address] = value

    def interface(name: str, default: Any) -> Any:
        attend = original(name, default)

        def recording(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **more: Any
        ) -> Any:
            at = f"layers.{module.layer_idx}.self_attn."
            keep(at + "q_rot", q)
            keep(at + "k_rot", k)
            output, pattern = attend(module, q, k, v, mask, scaling=scaling, **more)
            if pattern is not None and at + "scores" in wanted:
                keys = modeling_llama.repeat_kv(k, module.num_key_value_groups)
                keep(at + "scores", q @ keys.transpose(2, 3) * scaling + mask)
            keep(at + "pattern", pattern)
            keep(at + "z", output.transpose(1, 2))
            return output, pattern

        return recording

    original = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface
    with ExitStack() as hooks:
        for layer, block in enumerate(reference.model.layers):

            def before(_module: nn.Module, args: tuple[Tensor], layer: int = layer) -> None:
                keep(f"layers.{layer}.mlp.product", args[0])

            hooks.callback(block.mlp.down_proj.register_forward_pre_hook(before).remove)
        hooks.enter_context(patch.object(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", interface))
        yield seen
