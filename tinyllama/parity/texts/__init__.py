"""Real text to compare on: English, code, Chinese, fourteen other languages; SOURCES.md has their sources."""

from __future__ import annotations

from importlib.resources import files

from tinyllama.text.tokenizer import Tokenizer

NAMES = ("english", "code", "chinese", "scripts")
# Beginnings to be continued.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was",
    "Water boils at",
    "你好，世界",
    "1 + 1 = 2, 2 + 2 =",
    "Dear Sir or Madam,\n\n",
    "The three laws of robotics are",
    "Q: Why is the sky blue?\nA:",
    "In 1969",
)


def read(name: str) -> str:
    """The text of that name."""
    return (files(__name__) / f"{name}.txt").read_text(encoding="utf-8")


def encoded(tokenizer: Tokenizer, name: str, length: int) -> list[int]:
    """At most the first `length` ids of a text; of "scripts", an equal share of each language's paragraph."""
    if name != "scripts":
        return tokenizer.encode(read(name))[:length]
    paragraphs = [tokenizer.encode(paragraph) for paragraph in read(name).split("\n\n")]
    return [id for ids in paragraphs for id in ids[: length // len(paragraphs)]]
