"""Read and replace the values inside a forward pass, by address.

An address is a module path: `layers.3.self_attn.pattern` is what the module of that name gives out. A `*`
stands for any part between two dots: `layers.*.self_attn.pattern`, `layers.[0-3].mlp`.

```python
with tinyllama.capture(model, "layers.*") as residual:  # the residual stream after every layer
    model(ids)
with tinyllama.patch(model, {"layers.5.mlp": torch.zeros_like}):  # without one MLP
    logits = model(ids)
```

Where processes share a model (parallel/), each computes its own heads and channels. `whole=True` makes a
value whole on every rank; all ranks must ask for the same.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from tinyllama.config import LlamaConfig
from tinyllama.device import check_memory, described
from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.rope import RotaryEmbedding

# The last part of an address (a layer's is its number) -> the shape of its value; F is the MLP's width.
# A prefill asks lm_head for the last token alone: (B, 1, V).
SHAPES = {
    "embed_tokens": "B T C",
    "q_proj": "B T H*D",
    "k_proj": "B T K*D",
    "v_proj": "B T K*D",
    "q_rot": "B H T D",
    "k_rot": "B K T D",
    "scores": "B H T S",
    "pattern": "B H T S",
    "z": "B H T D",
    "gate_proj": "B T F",
    "up_proj": "B T F",
    "product": "B T F",
    "lm_head": "B T V",
}
RESIDUAL = "B T C"  # of all others: norms, o_proj, down_proj, self_attn, mlp, and a layer's result

Replacement = Tensor | Callable[[Tensor], Tensor]


@contextmanager
def capture(model: Llama, *patterns: str, whole: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the values at addresses while the block runs; the hooks are gone after it, whatever happens.

    Yields a dictionary from address to value in the order of the computation, filled again by each pass: copy
    what a later pass must not replace. Values are what the model computed, not copies; where gradients are
    recorded they belong to the graph.

    Args:
        model: the model.
        patterns: addresses, with * for any part.
        whole: where processes share the model, gather the parts of each value: the same on every rank.

    Raises:
        InputError: an address does not exist, or nothing computed it (a fused kernel has no scores and no
            pattern); the model is compiled, which ignores hooks; or the values need more memory than is
            free, said before they are computed.
    """
    wanted = matching(model, *patterns)
    values: dict[str, Tensor] = {}
    sharing = _sharing(model, wanted, whole)

    def check(_attention: nn.Module, args: tuple[Any, ...]) -> None:
        x, _, mask, _ = args
        (B, T), S = x.shape[:2], mask.allowed.shape[-1]
        needed = sum(numel(model.config, address, B, T, S) for address in wanted) * x.dtype.itemsize
        check_memory("what is captured", needed, x.device, "name fewer addresses, or run shorter texts")

    before = model.get_submodule("layers.0.self_attn").register_forward_pre_hook(check)
    keep = {address: partial(values.__setitem__, address) for address in wanted}
    with before, hooked(model, keep), ExitStack() as after:
        if sharing is not None:  # the final norm is computed when all layers are
            after.enter_context(hooked(model, {"norm": lambda _: sharing.complete(values, wanted)}))
        yield values
    _require_fired(model, wanted, values)


@contextmanager
def patch(model: Llama, replacements: Mapping[str, Replacement], *, whole: bool = False) -> Iterator[None]:
    """Replace values at addresses while the block runs; undone after it, whatever happens.

    Args:
        model: the model.
        replacements: address or pattern -> the tensor to put there, or a function from the value to the one
            in its place. Where several name one address, they act in this order.
        whole: where processes share the model, the values and what replaces them are whole, on every rank.

    Raises:
        InputError: as for `capture`, or a replacement has another shape, dtype or device than the value.
    """
    wanted, fired = matching(model, *replacements), dict[str, bool]()
    sharing = _sharing(model, wanted, whole)
    with ExitStack() as hooks:
        for pattern, replacement in replacements.items():
            for address in matching(model, pattern):

                def replace(value: Tensor, at: str = address, new: Replacement = replacement) -> Tensor:
                    fired[at] = True
                    if sharing is not None:
                        value = sharing.spread(at, sharing.whole(at, value))
                    result = new(value) if callable(new) else new
                    _require_alike(at, result, value)
                    return result if sharing is None else sharing.part(at, result)

                hooks.enter_context(hooked(model, {address: replace}))
        yield
    own = [address for address in wanted if sharing is None or sharing.computes(address)]
    _require_fired(model, own, fired)


@contextmanager
def hooked(model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call a function with the output of each module named; what it returns, unless None, takes its place."""
    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for address, function in functions.items():

            def hook(_module: nn.Module, _args: Any, output: Any, function: Any = function) -> Any:
                return function(output)

            hooks.enter_context(modules[address].register_forward_hook(hook))
        yield


def addresses(model: Llama) -> list[str]:
    """Every address of the model; those of a layer follow each other."""
    paths = []
    for path, module in model.named_modules():
        computes = not isinstance(module, (nn.ModuleList, RotaryEmbedding))
        if path and computes and not {"kernel", "own"} & set(path.split(".")):
            paths.append(path)
    return paths


def matching(model: Llama, *patterns: str) -> list[str]:
    """The addresses that the patterns stand for, each once.

    Raises:
        InputError: a pattern stands for none, or no hook would work here.
    """
    if not isinstance(model, Llama):
        raise InputError(f"model: expected a Llama, got {type(model).__name__}; pass the model itself")
    if any(module._compiled_call_impl or hasattr(module, "_orig_mod") for module in model.modules()):
        raise InputError("model: it is compiled, and would ignore hooks; use an uncompiled one")
    wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
    if wrong:
        raise InputError(f"addresses: expected strings, one by one, got {type(wrong[0]).__name__}")
    known = addresses(model)
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [address for address in known if _match(address, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0)
            raise InputError(f"{pattern}: no such address; near is {near[0]}, addresses() lists all")
        found |= dict.fromkeys(matches)
    if not found:
        raise InputError("addresses: expected one at least, got none; addresses() lists all")
    return list(found)


def shape(address: str) -> str:
    """The shape of the value at an address, in letters: "B H T S"."""
    return SHAPES.get(address.rpartition(".")[2], RESIDUAL)


def numel(config: LlamaConfig, address: str, B: int, T: int, S: int) -> int:
    """How many numbers the value at an address has, for B rows of T tokens that see S keys."""
    sizes = {"B": B, "T": T, "S": S} | {
        "C": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "D": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
    }
    return math.prod(sizes[letter] for letter in shape(address).replace("*", " ").split())


def _match(address: str, pattern: str) -> bool:
    parts, wanted = address.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _sharing(model: Llama, wanted: Iterable[str], whole: bool) -> Any:
    """What makes values whole; None if they are to stay as this process has them."""
    if model.sharing is None or whole:
        return model.sharing
    for address in wanted:
        if not model.sharing.computes(address):
            layers = model.sharing.layers
            raise InputError(
                f"{address}: expected one of layers {layers.start} to {layers.stop - 1}, which this rank "
                "computes; whole=True brings the others"
            )
    return None


def _require_fired(model: Llama, wanted: Iterable[str], fired: Mapping[str, object]) -> None:
    silent = [address for address in wanted if address not in fired]
    if not silent:
        return
    more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
    place, _, name = silent[0].rpartition(".")
    advice = "run the model inside the block"
    if name in ("scores", "pattern"):
        advice += (
            f", by a kernel that computes {name}, as eager does ({model.get_submodule(place).extra_repr()})"
        )
    raise InputError(f"{silent[0]}{more}: nothing was computed there; {advice}")


def _require_alike(address: str, result: Any, value: Tensor) -> None:
    if described(result) != described(value):
        raise InputError(
            f"{address}: expected a replacement like the value, {described(value)}, got {described(result)}"
        )
