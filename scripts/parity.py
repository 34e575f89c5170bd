"""Compare our logits and greedy ids with transformers', both judged by a float64 oracle.

relRMS, KL and top-1 are against the oracle; "bits" says whether every logit is the very float that
transformers computes with the same kind of attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama import options
from tinyllama.terminal import note, run

if TYPE_CHECKING:
    from tinyllama import Llama
    from tinyllama.parity.compare import Row

SHAPE = "tinyllama-shape"
SHAPE_POSITIONS = 48
TEXT_POSITIONS = 200
DTYPES = ["float64", "float32", "bfloat16", "float16"]

EXAMPLES = """\
  python scripts/parity.py                              the embedded model, and TinyLlama's shape
  python scripts/parity.py weights/TinyLlama-1.1B-Chat-v1.0 --dtype float32
  python scripts/parity.py tinyllama-shape              1.1 billion random unit-gain weights

exit status: 0 when everything passes, 1 on a mismatch, 2 on bad input"""


def main() -> int:
    """Compare every model in every dtype, print the table, and return 1 where anything fails."""
    args = parse()
    from tinyllama.parity.compare import compare_greedy, compare_logits

    failures = []
    for name in args.models:
        for dtype, model, ids in models(name, args.dtype):
            label = f"{name} {dtype}"
            note(f"{label}: comparing")
            rows = compare_logits(model, ids)
            show(f"{label}, {len(ids)} positions", rows)
            failures += [f"{label}: {row.who}: {failure}" for row in rows for failure in row.failures]
            ours, theirs = compare_greedy(model, ids)
            print(f"{len(theirs)} greedy ids: {'the same' if ours == theirs else 'OTHERS'}\n")
            if ours != theirs:
                failures.append(f"{label}: greedy ids: expected transformers' {theirs}, got {ours}")
    for failure in failures:
        print(failure)
    print("parity: FAILED" if failures else "parity: passed")
    return 1 if failures else 0


def show(title: str, rows: list[Row]) -> None:
    """Print one case: errors against the oracle, and whether our bits are those of transformers."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("against float64")
    for head in ("relRMS", "KL mean", "KL max", "top-1", "bits", "verdict"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row.who,
            f"{row.measured.relative:.2e}",
            f"{row.measured.kl_mean:.1e}",
            f"{row.measured.kl_max:.1e}",
            f"{row.measured.top1:.1%}",
            {None: "", True: "same", False: "others"}[row.same_bits],
            "" if row.same_bits is None else "FAILED" if row.failures else "passed",
        )
    Console().print(table)


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
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
        text = (Path(__file__).resolve().parents[1] / "LICENSE").read_text(encoding="utf-8")
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
