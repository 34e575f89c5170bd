"""`python -m tinyllama.explorer.measure`: what exploring costs, beside the model alone.

Times are medians; each line says what it is compared with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import tinyllama
from tinyllama.attention import eager
from tinyllama.cli import terminal
from tinyllama.device import machine
from tinyllama.explorer import record
from tinyllama.explorer.page import answers, page
from tinyllama.explorer.session import Session
from tinyllama.lab.kernel_file import BUILT_IN
from tinyllama.parity import texts

ROUNDS = 7


def main() -> int:
    """Measure, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="default: %(default)s")
    parser.add_argument(
        "--long", type=int, default=2048, help="tokens of the long text (default: %(default)s)"
    )
    args = parser.parse_args()
    model, tokenizer = tinyllama.load(args.model, device="cpu", dtype="float32", weights="exact")
    model.set_attention(eager)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    here = machine()
    print(f"{args.model} on {here['cpu']}, {here['threads']} threads, torch {here['torch']}")

    ids = texts.encoded(tokenizer, "english", args.long)
    short = Session(model, tokenizer, ids[:20], args.model, BUILT_IN)
    with torch.no_grad():
        plain = median(lambda: model(torch.tensor([ids[:20]])))
    print(f"20 tokens: recorded in {ms(median(lambda: record(model, ids[:20])))}, plain pass {ms(plain)}")
    first = median(lambda: [short.view("state", {}), short.view("code", {"layer": 15, "token": 0})])
    print(f"20 tokens: what the page shows first in {ms(first)}")

    recording, cache = record(model, ids[:20], capacity=300), model.new_cache(1, 300)
    recorded, alone = [], []
    with torch.no_grad():
        model(torch.tensor([ids[:20]]), cache)
        for id in ids[20 : 20 + 3 * ROUNDS]:
            recorded.append(seconds(partial(recording.extend, id)))
            alone.append(seconds(partial(model, torch.tensor([[id]]), cache)))
    print(f"a decode step: {ms(statistics.median(recorded))}, plain {ms(statistics.median(alone))}")

    kept = Session(model, tokenizer, ids[:64], args.model, BUILT_IN)
    print(f"a saved page of 64 tokens: {len(page(answers(kept, 15, 0))[0]) / 1e6:.2f} MB")

    start = time.perf_counter()
    session = Session(model, tokenizer, ids, args.model, BUILT_IN)
    print(f"{len(ids)} tokens: recorded in {time.perf_counter() - start:.1f} s")
    recording = session.branches[0].recording
    kinds = ("streams", "middles", "z", "mlps")
    held = sum(tensor.nbytes for one in recording.passes for kind in kinds for tensor in getattr(one, kind))
    held += sum(pattern.nbytes for one in recording.passes for pattern in one.patterns.values())
    print(f"{len(ids)} tokens: {held / 1e6:.0f} MB are kept, the weights are {weights / 1e6:.0f} MB")
    place: dict[str, Any] = {"branch": 0, "token": len(ids) - 5}
    layers = iter(range(model.config.num_hidden_layers))

    def layer() -> None:
        session.view("code", {**place, "layer": next(layers)})

    print(f"{len(ids)} tokens: another layer's code in {ms(median(layer))}")
    heads = iter(range(model.config.num_attention_heads))

    def row() -> None:
        session.view("row", {**place, "layer": 3, "head": next(heads)})

    print(f"{len(ids)} tokens: another head's weights in {ms(median(row))}")
    whole = seconds(lambda: session.view("map", {**place, "layer": 5, "head": 0}))
    print(f"{len(ids)} tokens: a head's whole map in {ms(whole)}")
    return 0


def seconds(do: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def median(do: Callable[[], object]) -> float:
    """The median of some rounds, after one that does not count."""
    do()
    return statistics.median(seconds(do) for _ in range(ROUNDS))


def ms(value: float) -> str:
    """Milliseconds."""
    return f"{1000 * value:.0f} ms"


if __name__ == "__main__":
    terminal.run(main)
