"""The seed notebook's own texts: what transformers 4.55 gave on the official TinyLlama weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from tinyllama.generation import generate
from tinyllama.model import Llama
from tinyllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Notebook:
    """What a model made of the notebook's prompts; `failures` has a line for each text that differs."""

    model: str
    dtype: str
    failures: list[str]


def notebook_failures(
    model: Llama, tokenizer: Tokenizer, generate: Callable[..., list[list[int]]] = generate
) -> list[str]:
    """Generate every text of the notebook again; one line for each that differs.

    Args:
        model: TinyLlama-1.1B-Chat in float32.
        tokenizer: its tokenizer.
        generate: what generates.
    """
    failures = []
    for case in notebook_cases():
        prompt = case["prompt_ids"]
        (ids,) = generate(model, [prompt], **case["settings"])
        # The notebook printed the first text together with its prompt.
        text = tokenizer.decode(ids if "ids" in case else prompt + ids, skip_special=True)
        if text != case["text"] or ids != case.get("ids", ids):
            failures.append(f"notebook, {case['name']}: expected {case['text']!r}, got {text!r}")
    return failures


def notebook_cases() -> list[dict[str, Any]]:
    """Prompts, settings, and what came out."""
    text = (files("tinyllama.parity") / "notebook.json").read_text(encoding="utf-8")
    return json.loads(text)["cases"]
