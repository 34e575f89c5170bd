"""Measure load, prefill and decode beside transformers in one run, on TinyLlama's shape with random weights.

Loads run in fresh processes, in turn; speeds in one process, in turn, over the same weights. Quote the
ratios: absolute figures drift with whatever else the machine does. transformers runs its plain forward loop
with sdpa and its dynamic cache, which is a little faster than its `generate`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tinyllama import options
from tinyllama.terminal import note, run

if TYPE_CHECKING:
    import torch

    from tinyllama import Llama

OURS, THEIRS = "tinyllama", "transformers"
PROMPT_TOKENS = 16

EXAMPLES = """\
  python scripts/bench.py
  python scripts/bench.py --dtype float32 --rounds 9 --json
  python scripts/bench.py --config weights/SmolLM2-135M-Instruct/config.json"""


def main() -> int:
    """Measure, and print a table or JSON."""
    args = parse()
    if args.load:
        print(json.dumps(measure_load(*args.load)))
        return 0
    from tinyllama import LlamaConfig
    from tinyllama.files import read_json
    from tinyllama.machine import machine

    config = LlamaConfig() if args.config is None else LlamaConfig.from_dict(read_json(args.config))
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: v for k, v in vars(args).items() if k != "load"},
    }
    with tempfile.TemporaryDirectory(prefix="tinyllama-bench-") as folder:
        note(f"drawing {sum(config.parameters.values()) / 1e6:.0f} million bfloat16 weights")
        write_random_checkpoint(config, Path(folder))
        for dtype in args.dtype:
            note(f"{dtype}: loading")
            loads: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
            for _ in range(args.load_rounds):
                for who, figures in loads.items():
                    figures.append(load_in_fresh_process(who, folder, dtype))
            note(f"{dtype}: prefill and decode, {args.rounds} rounds")
            speeds = measure_speed(Path(folder), dtype, args)
            results[dtype] = {
                who: {key: median(figures[key] for figures in loads[who]) for key in loads[who][0]}
                | speeds[who]
                for who in (OURS, THEIRS)
            }
    if args.json:
        print(json.dumps(results, indent=2, default=str))
    else:
        show(results, args)
    return 0


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5, help="of prefill and decode (default: %(default)s)")
    parser.add_argument("--load-rounds", type=int, default=3, help="of loads (default: %(default)s)")
    parser.add_argument(
        "--prefill", type=int, default=128, help="tokens in the prefill (default: %(default)s)"
    )
    parser.add_argument(
        "--decode", type=int, default=32, help="steps after the prompt (default: %(default)s)"
    )
    parser.add_argument("--config", type=Path, help="a config.json (default: TinyLlama-1.1B's shape)")
    parser.add_argument("--device", default="cpu", help="where prefill and decode run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--load", nargs=3, metavar=("WHO", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ["float32", "bfloat16"]
    return args


def write_random_checkpoint(config: Any, folder: Path) -> None:
    """A checkpoint folder of that shape with small normal weights, in bfloat16 as TinyLlama's."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import tinyllama
    from tinyllama.parity.reference import config_fields

    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in tinyllama.Llama(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        (name if name.startswith("lm_head") else f"model.{name}"): torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = config_fields(config) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fields["transformers_version"] = transformers.__version__
    (folder / "config.json").write_text(json.dumps(fields))


def load_in_fresh_process(who: str, folder: str, dtype: str) -> dict[str, float]:
    """What `measure_load` finds in a process of its own."""
    command = [sys.executable, __file__, "--load", who, folder, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_load(who: str, folder: str, dtype: str) -> dict[str, float]:
    """Seconds from the files to a first token, and by how much the process's peak memory grew.

    The token counts because a mapped file is read only when its weights are used.
    """
    import torch

    if who == OURS:
        from tinyllama import load_model
    else:
        from transformers import LlamaForCausalLM

    start, before = time.perf_counter(), memory("VmRSS")
    with torch.inference_mode():
        if who == OURS:
            load_model(folder, device="cpu", dtype=dtype)(torch.tensor([[1]]))
        else:
            LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))(torch.tensor([[1]]))
    return {"load_seconds": time.perf_counter() - start, "load_peak_bytes": memory("VmHWM") - before}


def memory(field: str) -> int:
    """A memory figure of this process in bytes: VmRSS is now, VmHWM the highest so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure_speed(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median tokens a second in prefill and decode, in turn over the same weights."""
    import torch

    import tinyllama
    from tinyllama.parity.reference import reference_model

    model = tinyllama.load_model(folder, device=args.device, dtype=dtype)
    reference = reference_model(model, "sdpa")
    generator = torch.Generator().manual_seed(0)
    length = max(args.prefill, PROMPT_TOKENS)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(args.device)

    def our_prefill() -> None:
        tinyllama.prefill(model, [ids[0, : args.prefill].tolist()], model.new_cache(1, args.prefill))

    @torch.inference_mode()
    def their_prefill() -> None:
        reference(ids[:, : args.prefill], use_cache=True, logits_to_keep=1)

    runs: dict[str, dict[str, Callable[[], float]]] = {
        OURS: {
            "prefill": lambda: args.prefill / timed(our_prefill),
            "decode": lambda: decode_ours(model, ids, args.decode),
        },
        THEIRS: {
            "prefill": lambda: args.prefill / timed(their_prefill),
            "decode": lambda: decode_theirs(reference, ids, args.decode),
        },
    }
    figures: dict[str, dict[str, list[float]]] = {who: {name: [] for name in runs[who]} for who in runs}
    for _ in range(args.rounds + 1):
        for name in ("prefill", "decode"):
            for who in runs:
                figures[who][name].append(runs[who][name]())
    # The first round warms up.
    return {who: {name: median(values[1:]) for name, values in figures[who].items()} for who in figures}


def timed(action: Callable[[], None]) -> float:
    """Seconds that the action took, on a GPU until it is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def decode_ours(model: Llama, ids: torch.Tensor, steps: int) -> float:
    """Our decode steps a second, after the prompt and the first token."""
    import tinyllama

    prompt = ids[0, :PROMPT_TOKENS].tolist()
    tokens = tinyllama.stream(model, prompt, max_new_tokens=steps + 1, eos_ids=())
    next(tokens)
    return steps / timed(lambda: deque(tokens, maxlen=0).clear())


def decode_theirs(reference: Any, ids: torch.Tensor, steps: int) -> float:
    """Decode steps a second of transformers' forward pass with its dynamic cache, after the prompt."""
    import torch
    import transformers

    with torch.inference_mode():
        cache = transformers.DynamicCache(config=reference.config)
        token = reference(ids[:, :PROMPT_TOKENS], past_key_values=cache).logits[:, -1:].argmax(-1)

        def decode() -> None:
            nonlocal token
            for _ in range(steps):
                token = reference(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                token.item()  # as a stream needs it

        return steps / timed(decode)


def show(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{results['machine']['cpu']}, {results['machine']['threads']} threads",
        caption=f"medians of {args.rounds} rounds; prefill {args.prefill} tokens, decode {args.decode} steps",
    )
    table.add_column("dtype")
    table.add_column("figure")
    for who in (OURS, THEIRS, "ratio"):
        table.add_column(who, justify="right")
    rows = [
        ("load to first token, s", "load_seconds", 1.0),
        ("peak memory, GB", "load_peak_bytes", 1e-9),
        ("prefill, tokens/s", "prefill", 1.0),
        ("decode, tokens/s", "decode", 1.0),
    ]
    for dtype in args.dtype:
        for title, key, unit in rows:
            ours, theirs = (results[dtype][who][key] for who in (OURS, THEIRS))
            table.add_row(dtype, title, f"{ours * unit:.2f}", f"{theirs * unit:.2f}", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
