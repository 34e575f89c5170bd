"""The call that works here, said to a slip of the pen or to a call that another library would take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from tinyllama.errors import InputError

# Names that transformers' models and tokenizers have, and what does the same here.
OF_A_MODEL = {
    "generate": "(new_ids,) = tinyllama.generate(model, [ids], max_new_tokens=20, temperature=0.7)",
    "model": "model.layers, model.embed_tokens and model.norm, without another model. before them",
    "device": "model.embed_tokens.weight.device",
}
OF_A_TOKENIZER = {
    "apply_chat_template": 'ids = tokenizer.chat([{"role": "user", "content": "Hi"}])',
    "batch_decode": "[tokenizer.decode(row) for row in rows]",
    "convert_ids_to_tokens": "[tokenizer.piece(id) for id in ids]",
    "tokenize": "tokenizer.explain(text), or [tokenizer.piece(id) for id in tokenizer.encode(text)]",
    "bos_token_id": "tokenizer.bos_id",
    "eos_token_id": "tokenizer.eos_id",
    "pad_token_id": "tokenizer.pad_id",
}
SETTINGS = {
    "do_sample": "temperature=0.7 samples, temperature=0 is greedy",
    "max_length": "max_new_tokens=20 counts the new ones alone",
    "eos_token_id": "eos_ids=[id]",
    "pad_token_id": "leave it out: padding has no id here",
    "attention_mask": "leave it out: prompts may have different lengths",
}


class NoSuchNameError(InputError, AttributeError):
    """A name of another library was asked for; to `hasattr` it is an AttributeError."""


def did_you_mean(name: str, known: Iterable[str], meant: Mapping[str, str] = MappingProxyType({})) -> str:
    """What to add to a message: "; did you mean 'window'?", or nothing if no known name is near.

    Upper and lower case count as the same; `meant` has the name to suggest where that is another.
    """
    by_lower_case = {one.lower(): meant.get(one, one) for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""


def no_such_name(thing: object, name: str, instead: Mapping[str, str]) -> AttributeError:
    """What `__getattr__` raises for a name that is neither the thing's own nor in a base class."""
    kind = type(thing).__name__
    if name in instead:
        return NoSuchNameError(f"{kind}: has no {name}, expected {instead[name]}")
    return AttributeError(f"{kind!r} object has no attribute {name!r}")


def not_a_batch(ids: Any) -> InputError:
    """What to say of ids that are no tensor (B, T)."""
    if hasattr(ids, "shape"):
        got, call = f"{type(ids).__name__} {list(ids.shape)}", "model(ids[None]) if it is one text's"
    else:
        got, call = type(ids).__name__, "model(torch.tensor([ids])) for one text's list"
    return InputError(f"ids: expected a tensor of rows and tokens, (B, T), got {got}; write {call}")


def check_prompts(prompts: Any) -> None:
    """Raise InputError for a text, or for the ids of one prompt, where ids of several are expected."""
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise InputError("prompts: expected ids, got a text; write generate(model, [tokenizer.encode(text)])")
    if any(_is_number(prompt) for prompt in prompts):
        raise InputError(
            "prompts: expected a list of prompts, got the ids of one; write "
            "(new_ids,) = generate(model, [ids])"
        )


def check_prompt(ids: Any) -> None:
    """Raise InputError for anything but the ids of one prompt."""
    if isinstance(ids, str):
        raise InputError("ids: expected ids, got a text; write stream(model, tokenizer.encode(text))")
    if not all(_is_number(id) for id in ids):
        raise InputError("ids: expected those of one prompt, got several; write stream(model, prompts[0])")


def check_settings(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError for a setting of a generation that there is not."""
    known = list(known)
    for name in given:
        if name not in known:
            said = f"; {SETTINGS[name]}" if name in SETTINGS else did_you_mean(name, known)
            raise InputError(f"generate: expected settings {', '.join(known)}, got {name!r:.80}{said}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or getattr(value, "ndim", None) == 0  # an int of NumPy, or of a tensor
