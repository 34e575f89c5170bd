"""Forks: the same text with something switched off, replaced, patched in or forced, beside the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.errors import InputError
from tinyllama.explorer.recording import Recording, shown
from tinyllama.kernels import ByHead, Kernel


@dataclass(frozen=True)
class Fork:
    """One change.

    Attributes:
        name: what it does, in a few words.
        python: the lines that do the same in a notebook, given `model` and `ids`.
        replace: address -> function from the value, with its first position, to the one in its place.
        kernel: another kernel, with the layer and the heads (None: all) where it attends.
    """

    name: str
    python: str
    replace: Mapping[str, Callable[[Tensor, int], Tensor]] | None = None
    kernel: tuple[Kernel, int, tuple[int, ...] | None] | None = None

    def apply(self, recording: Recording) -> None:
        """Let a recording that is still empty compute with the change."""
        if self.kernel is not None:
            kernel, layer, heads = self.kernel
            before = recording.kernels[layer]
            recording.kernels[layer] = shown(kernel if heads is None else ByHead(kernel, heads, before))
            recording.watch_kernels()
        if self.replace is not None:
            recording.replacements = dict(self.replace)


def switched_off(part: str, layer: int, heads: tuple[int, ...] = ()) -> Fork:
    """Without some heads, a layer's attention, its MLP, or the whole layer.

    Args:
        part: "heads", "attention", "mlp" or "layer".
        layer: which layer.
        heads: the query heads, where some are meant.
    """
    at = f"layers.{layer}"
    if part == "heads":
        listed = list(heads)

        def without(value: Tensor, start: int) -> Tensor:
            return value.index_fill(1, torch.tensor(listed, device=value.device), 0)

        name = f"layer {layer} without head{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"
        python = (
            f"heads = torch.tensor({listed})\n"
            f'with tinyllama.patch(model, {{"{at}.self_attn.z": lambda z: z.index_fill(1, heads, 0)}}):\n'
            "    logits = model(torch.tensor([ids]))"
        )
        return Fork(name, python, {f"{at}.self_attn.z": without})
    addresses = {
        "attention": [f"{at}.self_attn"],
        "mlp": [f"{at}.mlp"],
        "layer": [f"{at}.self_attn", f"{at}.mlp"],
    }
    if part not in addresses:
        raise InputError(f"part: expected heads, attention, mlp or layer, got {part!r:.40}")
    zeros = ", ".join(f'"{address}": torch.zeros_like' for address in addresses[part])
    return Fork(
        f"without layer {layer}" if part == "layer" else f"layer {layer} without its {part}",
        f"with tinyllama.patch(model, {{{zeros}}}):\n    logits = model(torch.tensor([ids]))",
        dict.fromkeys(addresses[part], lambda value, start: torch.zeros_like(value)),
    )


def other_kernel(spec: str, kernel: Kernel, layer: int, heads: tuple[int, ...] | None) -> Fork:
    """Another attention in one layer, or in some of its heads."""
    where = "" if heads is None else f", heads={list(heads)}"
    return Fork(
        f"{spec} in layer {layer}" + ("" if heads is None else f", heads {', '.join(map(str, heads))}"),
        f'model.set_attention(tinyllama.lab.load_kernel("{spec}"), layers=[{layer}]{where})\n'
        "logits = model(torch.tensor([ids]))",
        kernel=(kernel, layer, heads),
    )


# What can be put in from another text -> its address after that of the layer.
PARTS = {"layer": "", "attention": ".self_attn", "mlp": ".mlp", "head": ".self_attn.z"}


def patched_in(part: str, layer: int, head: int, token: int, other: Recording, at: int, text: str) -> Fork:
    """A value of another text at one of its tokens, in the place of this text's at one token.

    Args:
        part: of PARTS: the layer's output, what its attention or its MLP adds, or a head's output.
        layer: the layer.
        head: the head, where one is meant.
        token: where in this text.
        other: the other text.
        at: where in the other text.
        text: the other text as it was written.
    """
    if part not in PARTS:
        raise InputError(f"part: expected {', '.join(PARTS)}, got {part!r:.40}")
    address = f"layers.{layer}{PARTS[part]}"
    one, index = other.at(at)
    place = f"0, {head}" if part == "head" else "0"

    def rows(x: Tensor) -> Tensor:
        return x[0, head] if part == "head" else x[0]

    value = rows(one.value(layer, address))[index]

    def put(x: Tensor, start: int) -> Tensor:
        if not start <= token < start + x.shape[-2]:
            return x
        x = x.clone()
        rows(x)[token - start] = value
        return x

    python = (
        f"other = {other.ids}  # {text!r:.60}\n"
        f'with tinyllama.capture(model, "{address}") as seen:\n'
        "    model(torch.tensor([other]))\n"
        f'value = seen["{address}"][{place}, {at}]\n'
        "def put(x):\n"
        "    x = x.clone()\n"
        f"    x[{place}, {token}] = value\n"
        "    return x\n"
        f'with tinyllama.patch(model, {{"{address}": put}}):\n'
        "    logits = model(torch.tensor([ids]))"
    )
    which = {"layer": f"layer {layer}", "head": f"head {head} of layer {layer}"}
    which |= {"attention": f"layer {layer}'s attention", "mlp": f"layer {layer}'s MLP"}
    return Fork(
        f"{which[part]} at token {token} from token {at} of {text!r:.40}",
        python,
        {address: put},
    )
