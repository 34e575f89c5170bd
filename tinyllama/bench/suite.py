"""One run of the benchmark: the sizes, the order in which all is measured, and its results."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from tinyllama.bench import goals as judged
from tinyllama.bench.limits import Memory, matmul_peak
from tinyllama.bench.lineup import Lineup
from tinyllama.bench.loads import measure_loads
from tinyllama.bench.measure import Rounds, interleave, steps_of
from tinyllama.bench.results import collect
from tinyllama.bench.sizes import Sizes
from tinyllama.config import LlamaConfig
from tinyllama.device import usable_device

Figures = dict[str, Any]

PEAKS = ("float32", "bfloat16")


class Progress(Protocol):
    """A progress bar: `progress.step_progress`."""

    def __call__(self, total: int) -> AbstractContextManager[Any]:
        """Yield what is to be called after each step."""


def measure(
    folder: Path, config: LlamaConfig, names: Sequence[str], device: str, sizes: Sizes, progress: Progress
) -> Figures:
    """Build every subject, measure speeds round by round, then loads, and judge the goals.

    Args:
        folder: a checkpoint; GGUF files are written into it.
        config: its shape.
        names: who takes part.
        device: where ours and transformers run.
        sizes: what is measured.
        progress: shows it.
    """
    place = usable_device(device)
    lineup = Lineup(folder, config, device, sizes.decode)
    with progress(len(names)) as step:
        lineup.build(names, step)
    rounds = _speeds(lineup, place, sizes, progress)
    subjects = lineup.subjects
    with progress(max(1, len(subjects) * (sizes.load_rounds + 1))) as step:
        taking_part = [subject.name for subject in subjects if not subject.name.startswith("hf-compiled")]
        loads = measure_loads(taking_part, folder, device, torch.get_num_threads(), sizes.load_rounds, step)
    results = collect(config, subjects, sizes.figures, rounds, loads, lineup.left_out)
    results["sizes"] = asdict(sizes)
    results["goals"] = _goals(results, sizes, place)
    return results


def _speeds(lineup: Lineup, place: torch.device, sizes: Sizes, progress: Progress) -> Rounds:
    memory, figures = Memory(place), sizes.figures
    peaks = {dtype: partial(matmul_peak, getattr(torch, dtype), place) for dtype in PEAKS}
    gc.collect()
    with progress(steps_of(figures, sizes.rounds, sizes.chart_rounds)) as step:
        return interleave(
            lineup.subjects, figures, sizes.rounds, sizes.chart_rounds, memory.bandwidth, peaks, step
        )


def _goals(results: Figures, sizes: Sizes, place: torch.device) -> list[Figures]:
    decode, prefill = sizes.decode.key, f"prefill@{sizes.prefill}"
    if place.type == "cuda":
        return judged.gpu_goals(results, decode, prefill)
    contexts = [f"decode@{context}" for context in sizes.ends]
    return judged.goals(results, decode, prefill, f"batch@{sizes.rows}", contexts)
