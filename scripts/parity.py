"""Compare our logits and greedy ids with transformers', both judged by a float64 oracle."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.terminal import note, run

if TYPE_CHECKING:
    from tinyllama import Llama

SHAPE = "tinyllama-shape"
SHAPE_POSITIONS = 48
TEXT_POSITIONS = 200
DTYPES = ["float64", "float32", "bfloat16", "float16"]

EXAMPLES = """\
examples:
  python scripts/parity.py                              the embedded model, and TinyLlama's shape
  python scripts/parity.py weights/TinyLlama-1.1B-Chat-v1.0 --dtype float32
  python scripts/parity.py tinyllama-shape              1.1 billion random unit-gain weights

exit status: 0 when everything passes, 1 on a mismatch, 2 on bad input
"""


def main() -> int:
    """Compare every model in every dtype, print the table, and return 1 where anything fails."""
    args = parse()
    from rich.console import Console
    from rich.table import Table

    from tinyllama.parity.compare import compare_greedy, compare_logits

    table = Table(title="logits against the float64 oracle")
    for head in ("model", "implementation"):
        table.add_column(head)
    for head in ("relRMS", "KL mean", "KL max", "top-1", "bits as transformers'", "verdict"):
        table.add_column(head, justify="right")
    failures = []
    for name in args.models:
        for dtype, model, ids in models(name, args.dtype):
            label = f"{name} {dtype}"
            note(f"{label}: {len(ids)} positions")
            for row in compare_logits(model, ids):
                ours = row.same_bits is not None
                table.add_row(
                    label,
                    row.who,
                    f"{row.measured.relative:.2e}",
                    f"{row.measured.kl_mean:.1e}",
                    f"{row.measured.kl_max:.1e}",
                    f"{row.measured.top1:.1%}",
                    ("the same" if row.same_bits else "others") if ours else "",
                    ("FAILED" if row.failures else "passed") if ours else "",
                )
                failures += [f"{label}: {row.who}: {failure}" for failure in row.failures]
            note(f"{label}: greedy ids")
            greedy, expected = compare_greedy(model, ids)
            if greedy != expected:
                failures.append(f"{label}: greedy ids: expected transformers' {expected}, got {greedy}")
    Console().print(table)
    for failure in failures:
        print(failure)
    print("parity: FAILED" if failures else "parity: passed")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", default=["smollm2", SHAPE], help=f"names or folders; {SHAPE} is random weights"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="may be given several times (default: float32 and bfloat16)",
    )
    args = parser.parse_args()
    # Widest first: random weights are rounded from one dtype to the next.
    args.dtype = sorted(args.dtype or ["float32", "bfloat16"], key=DTYPES.index)
    return args


def models(name: str, dtypes: list[str]) -> Iterator[tuple[str, Llama, list[int]]]:
    """One model in each dtype, one at a time, and the ids to compare it on."""
    import torch

    import tinyllama
    from tinyllama.parity.reference import unit_gain_

    if name != SHAPE:
        text = Path(__file__).read_text(encoding="utf-8")
        for dtype in dtypes:
            model, tokenizer = tinyllama.load(name, device="cpu", dtype=dtype)
            yield dtype, model, tokenizer.encode(text)[:TEXT_POSITIONS]
        return
    note(f"{SHAPE}: drawing 1.1 billion weights")
    with torch.device("meta"):
        model = tinyllama.Llama(tinyllama.LlamaConfig())
    model = unit_gain_(model.to_empty(device="cpu")).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (SHAPE_POSITIONS,), generator=generator).tolist()
    for dtype in dtypes:
        yield dtype, model.to(getattr(torch, dtype)), ids


if __name__ == "__main__":
    run(main)
