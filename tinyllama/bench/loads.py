"""Loads in fresh processes: from the files to a first token, and the memory that takes.

A process is `python -m tinyllama.bench.loads SUBJECT FOLDER DEVICE THREADS`, and prints its figures as JSON.
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before torch, transformers or llama.cpp is imported

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

Figures = dict[str, Any]

FEW = 64  # tokens of context are enough for one
STATUS = Path("/proc/self/status")


def measure_loads(
    names: Sequence[str], folder: Path, device: str, threads: int, rounds: int, step: Callable[[str], None]
) -> dict[str, list[Figures]]:
    """Loads of every subject in turn, each in a process of its own; a first round warms the file cache up."""
    taken: dict[str, list[Figures]] = {name: [] for name in names}
    for turn in range(rounds + 1 if rounds else 0):
        for name in names:
            figures = load_in_fresh_process(name, folder, device, threads)
            if turn:
                taken[name].append(figures)
            step(f"load, {name}")
    return taken


def load_in_fresh_process(name: str, folder: Path, device: str, threads: int) -> Figures:
    """What `measure_load` finds in a process of its own."""
    command = [sys.executable, "-m", "tinyllama.bench.loads", name, str(folder), device, str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_load(name: str, folder: Path, device: str, threads: int) -> Figures:
    """Seconds from the files to a first token, and by how much the process's peak memory grew.

    The token counts because a mapped file is read only when its weights are used.

    Returns:
        `seconds` since just before the load; `with_import` since before the libraries were imported; `bytes`
        of peak memory over what the imports took, None where the system does not say; `weights`, the bytes
        that the loaded model keeps, None for a peer.
    """
    load, first_token, weigh = _loader(name, folder, device, threads)
    before, start = _memory("VmRSS"), time.perf_counter()
    model = load()
    first_token(model)
    end = time.perf_counter()
    highest = _memory("VmHWM")
    return {
        "seconds": end - start,
        "with_import": end - START,
        "bytes": None if highest is None or before is None else highest - before,
        "weights": weigh(model),
    }


Loader = tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], int | None]]


def _loader(name: str, folder: Path, device: str, threads: int) -> Loader:
    """What loads the subject, makes a token and weighs it; its libraries are imported here."""
    if name.startswith("ours"):
        import tinyllama
        from tinyllama.bench.names import MODES
        from tinyllama.bench.ours import weight_bytes

        return (
            lambda: MODES[name].load(folder, device),
            lambda model: tinyllama.generate(model, [[1]], max_new_tokens=1, eos_ids=()),
            weight_bytes,
        )
    if name.startswith("hf"):
        import torch
        from transformers import LlamaForCausalLM

        dtype = getattr(torch, name.rsplit("-", 1)[1])

        @torch.inference_mode()
        def first_token(model: Any) -> int:
            return model(torch.tensor([[1]], device=device)).logits[0, -1].argmax().item()

        return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device), first_token, _unknown
    import llama_cpp  # noqa: F401

    from tinyllama.bench.llama_cpp_api import gguf_path, open_llama_cpp

    return (
        lambda: open_llama_cpp(gguf_path(folder, name), FEW, threads),
        lambda model: model.eval([1]),
        _unknown,
    )


def _unknown(_model: Any) -> None:
    return None


def _memory(field: str) -> int | None:
    """A memory figure of this process in bytes: VmRSS is now, VmHWM the highest so far (Linux)."""
    for line in STATUS.read_text().splitlines() if STATUS.exists() else []:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    print(json.dumps(measure_load(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
