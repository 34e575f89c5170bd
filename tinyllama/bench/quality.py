"""What the fast modes cost in quality: KL, top-1 and perplexity to the full weights of a trained model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.bench.gguf_file import write_gguf
from tinyllama.bench.llama_cpp_api import open_llama_cpp, require_llama_cpp
from tinyllama.bench.names import GGUF_KINDS, Mode
from tinyllama.checkpoints.config_file import read_config
from tinyllama.errors import InputError
from tinyllama.lab.perplexity import perplexity
from tinyllama.parity import texts
from tinyllama.parity.measure import Difference, difference
from tinyllama.text.tokenizer import Tokenizer

Figures = dict[str, Any]
Logits = Callable[[Sequence[int]], Tensor]

POSITIONS = 256  # of each bundled text: some 1,000 in all
MODES = {
    "ours-mixed": Mode("float32", "bfloat16"),
    "ours-bfloat16": Mode("bfloat16", "bfloat16"),
    "ours-int8": Mode("float32", "int8"),
    "ours-int8-bfloat16": Mode("bfloat16", "int8"),
}
# What 8-bit weights may cost.
MAX_KL, MIN_TOP1, MAX_PERPLEXITY = 0.01, 0.95, 1.01


def quality(
    folder: Path,
    names: Sequence[str] = (*MODES, *GGUF_KINDS),
    positions: int = POSITIONS,
    done: Callable[[str], object] = lambda what: None,
) -> Figures:
    """Compare each mode's logits with those of the exact float32 model, teacher-forced on the bundled texts.

    Args:
        folder: a checkpoint with its tokenizer.
        names: of MODES and GGUF_KINDS.
        positions: of each text.
        done: told of each step.
    """
    tokenizer = Tokenizer.from_folder(folder)
    ids = {name: texts.encoded(tokenizer, name, positions) for name in texts.NAMES}
    done("the full weights")
    exact = _ours(Mode("float32", "exact"), folder)
    truth = {name: exact(text).double() for name, text in ids.items()}
    rows, left_out = [], {}
    with tempfile.TemporaryDirectory(prefix="tinyllama-quality-") as scratch:
        for name in names:
            done(name)
            try:
                logits = (
                    _ours(MODES[name], folder) if name in MODES else _llama_cpp(name, folder, Path(scratch))
                )
            except InputError as error:
                left_out[name] = str(error)
                continue
            rows.append({"name": name, **_row(logits, ids, truth)})
    return {
        "positions": sum(map(len, ids.values())),
        "rows": rows,
        "left_out": left_out,
        "goals": judge(rows),
    }


def _row(logits: Logits, ids: Mapping[str, Sequence[int]], truth: Mapping[str, Tensor]) -> Figures:
    parts = [difference(logits(text), truth[name], text) for name, text in ids.items()]
    whole = Difference.joined(parts)
    return {
        "kl_mean": whole.kl_mean,
        "kl_max": whole.kl_max,
        "top1": whole.top1,
        **asdict(perplexity([part.nll for part in parts], [part.truth_nll for part in parts])),
    }


def judge(rows: Sequence[Figures]) -> list[Figures]:
    """The goals for 8-bit weights, beside what was measured of each mode that has them."""
    theirs = [row["kl_mean"] for row in rows if row["name"] == "llama.cpp-q8"]
    goals: list[tuple[str, str, str, bool]] = []
    for row in rows:
        name, kl, top1, ratio = row["name"], row["kl_mean"], row["top1"], row["ratio"]
        if not name.startswith("ours-int8"):
            continue
        goals += [
            (f"{name}: KL mean", f"≤ {MAX_KL}", f"{kl:.1e}", kl <= MAX_KL),
            (f"{name}: top-1", f"≥ {MIN_TOP1:.0%}", f"{top1:.1%}", top1 >= MIN_TOP1),
            (
                f"{name}: perplexity",
                f"≤ {MAX_PERPLEXITY - 1:+.0%}",
                f"{ratio - 1:+.2%}",
                ratio <= MAX_PERPLEXITY,
            ),
        ]
        goals += [(f"{name}: KL mean", f"≤ Q8_0's {limit:.1e}", f"{kl:.1e}", kl <= limit) for limit in theirs]
    return [dict(zip(("name", "goal", "measured", "met"), goal, strict=True)) for goal in goals]


def _ours(mode: Mode, folder: Path) -> Logits:
    model = mode.load(folder, "cpu")

    @torch.inference_mode()
    def logits(ids: Sequence[int]) -> Tensor:
        return model(torch.tensor([ids]))[0]

    return logits


def _llama_cpp(name: str, folder: Path, scratch: Path) -> Logits:
    require_llama_cpp()
    path = scratch / f"{name}.gguf"
    write_gguf(folder, path, GGUF_KINDS[name])
    context = read_config(folder).max_position_embeddings
    model = open_llama_cpp(path, context, torch.get_num_threads(), logits_all=True)

    def logits(ids: Sequence[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(model.scores[: len(ids)].copy())

    return logits
