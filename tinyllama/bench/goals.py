"""The project's goals for speed, each beside what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Figures = dict[str, Any]

# Which of our modes a goal is about: the fastest of them counts.
WIDE = ("ours-exact", "ours-float32")
SIXTEEN = ("ours-mixed", "ours-bfloat16")
EIGHT = ("ours-int8", "ours-int8-bfloat16")
HF_WIDE = ("hf-float32", "hf-compiled-float32")
HF_BEST = (*HF_WIDE, "hf-bfloat16", "hf-compiled-bfloat16", "hf-float16", "hf-compiled-float16")


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        name: what it is about.
        goal: what is asked.
        measured: what was found; or why there is nothing.
        met: None where it was not measured.
    """

    name: str
    goal: str
    measured: str
    met: bool | None


def goals(results: Figures, decode: str, prefill: str, batch: str, contexts: Sequence[str]) -> list[Figures]:
    """Judge the results of `results.collect`.

    Args:
        results: with "bandwidth", "peaks" and "subjects".
        decode: key of the decode figure that counts.
        prefill: that of the prefill.
        batch: that of the batch.
        contexts: keys of the decode figures with a short and a long context; none where one is missing.
    """
    at = _Judge(results)
    rows = [
        at.ratio("decode, float32", WIDE, decode, 1.6, "transformers float32", HF_WIDE),
        at.ratio("decode, 16-bit weights", SIXTEEN, decode, 1.05, "llama.cpp F16", ("llama.cpp-f16",)),
        at.ratio("decode, 16-bit weights", SIXTEEN, decode, 1.7, "transformers' best", HF_BEST),
        at.share("decode, 16-bit weights", SIXTEEN, decode, 0.9, "read bandwidth"),
        at.ratio(
            f"prefill {_size(prefill)}, 16-bit", SIXTEEN, prefill, 1.0, "llama.cpp F16", ("llama.cpp-f16",)
        ),
        at.ratio(f"prefill {_size(prefill)}, 16-bit", SIXTEEN, prefill, 1.5, "transformers' best", HF_BEST),
        at.ratio("decode, 8-bit weights", EIGHT, decode, 1.1, "llama.cpp Q8_0", ("llama.cpp-q8",)),
        Goal("8-bit: KL to the full weights", "≤ llama.cpp Q8_0's", "see bench.py --quality", None),
        at.long_context(contexts),
        at.batch(batch),
        *at.loads(),
        Goal("each fast mode: parity", "passes for its dtype", "see make parity", None),
    ]
    return [asdict(row) for row in rows]


def gpu_goals(results: Figures, decode: str, prefill: str) -> list[Figures]:
    """Judge a run on a GPU, in bfloat16."""
    at, mode = _Judge(results), ("ours-bfloat16",)
    rows = [
        at.share("decode, bfloat16", mode, decode, 0.8, "device-copy bandwidth"),
        at.peak(f"prefill {_size(prefill)}, bfloat16", mode, prefill, 0.6),
    ]
    return [asdict(row) for row in rows]


def _size(key: str) -> str:
    return f"{int(key.split('@')[1]):,}"


@dataclass(frozen=True)
class _Judge:
    results: Figures

    def figure(self, name: str, key: str) -> Figures | None:
        return self.results["subjects"].get(name, {}).get("figures", {}).get(key)

    def fastest(self, names: Sequence[str], key: str) -> str | None:
        found = [(f["speed"]["median"], name) for name in names if (f := self.figure(name, key))]
        return max(found)[1] if found else None

    def ratio(
        self, title: str, ours: Sequence[str], key: str, goal: float, against: str, peers: Sequence[str]
    ) -> Goal:
        mine, theirs = self.fastest(ours, key), self.fastest(peers, key)
        value = None
        if mine and theirs:
            value = self.speed(mine, key) / self.speed(theirs, key)
        return _at_least(title, f"≥ {goal:g} × {against}", value, goal, "×", f"{mine} to {theirs}")

    def speed(self, name: str, key: str) -> float:
        return self.results["subjects"][name]["figures"][key]["speed"]["median"]

    def share(self, title: str, ours: Sequence[str], key: str, goal: float, of: str) -> Goal:
        mine = self.fastest(ours, key)
        figure = self.figure(mine, key) if mine else None
        value = figure["bandwidth_share"]["median"] if figure else None
        return _at_least(title, f"≥ {goal:.0%} of {of}", value, goal, "%", str(mine))

    def peak(self, title: str, ours: Sequence[str], key: str, goal: float) -> Goal:
        mine, peak = self.fastest(ours, key), self.results["peaks"].get("bfloat16")
        figure = self.figure(mine, key) if mine else None
        value = None
        if figure and peak:
            size = int(key.split("@")[1])
            value = figure["flops"] * figure["speed"]["median"] / size / peak
        return _at_least(title, f"≥ {goal:.0%} of matmul peak", value, goal, "%", str(mine))

    def long_context(self, contexts: Sequence[str]) -> Goal:
        """The slowest of the fast modes' shares, each measured just after the short context, counts."""
        if not contexts:
            return Goal("decode, long context", "≥ 85% of short", "not measured: contexts left out", None)
        short, long = contexts
        shares = {
            name: beside["median"]
            for name in (*SIXTEEN, *EIGHT, "ours-float32")
            if (figure := self.figure(name, long)) and (beside := figure["beside"])
        }
        worst = min(shares, key=lambda name: shares[name], default=None)
        title = f"decode at {_size(long)} of context"
        return _at_least(
            title, f"≥ 85% of at {_size(short)}", shares.get(worst or ""), 0.85, "%", f"worst: {worst}"
        )

    def batch(self, key: str) -> Goal:
        """Of the fast 16-bit mode with the highest throughput in batches, to that alone just before."""
        mine = self.fastest(SIXTEEN, key)
        figure = self.figure(mine, key) if mine else None
        value = figure["beside"]["median"] if figure and figure["beside"] else None
        return _at_least(f"batch {_size(key)}, throughput", "≥ 4 × batch 1", value, 4.0, "×", str(mine))

    def load(self, name: str) -> Figures | None:
        return self.results["subjects"].get(name, {}).get("load")

    def loads(self) -> list[Goal]:
        rows = []
        for title, ours, peer in (("float32", WIDE, "hf-float32"), ("16-bit", SIXTEEN, "hf-bfloat16")):
            theirs = self.load(peer)
            mine = [(load["seconds"]["median"], name, load) for name in ours if (load := self.load(name))]
            value, who = None, ""
            if theirs and mine:
                seconds, name, load = min(mine, key=lambda found: found[:2])
                value = seconds / theirs["seconds"]["median"]
                whole = load["with_import"]["median"] / theirs["with_import"]["median"]
                who = f"{name}; {whole:.2f} × with imports"
            rows.append(_at_most(f"load to first token, {title}", f"≤ 0.5 × {peer}", value, 0.5, who))
        sizes = {
            name: load["bytes"] / load["weights"]
            for name in (*WIDE, *SIXTEEN, *EIGHT)
            if (load := self.load(name)) and load["bytes"] and load["weights"]
        }
        worst = max(sizes, key=lambda name: sizes[name], default="")
        rows.append(
            _at_most("load: peak memory", "≤ 1.15 × weights", sizes.get(worst), 1.15, f"worst: {worst}")
        )
        return rows


def _at_least(name: str, goal: str, value: float | None, limit: float, unit: str, who: str) -> Goal:
    return _judged(name, goal, value, lambda found: found >= limit, unit, who)


def _at_most(name: str, goal: str, value: float | None, limit: float, who: str) -> Goal:
    return _judged(name, goal, value, lambda found: found <= limit, "×", who)


def _judged(
    name: str, goal: str, value: float | None, passes: Callable[[float], bool], unit: str, who: str
) -> Goal:
    if value is None:
        return Goal(name, goal, "not measured in this run", None)
    shown = f"{value:.1%}" if unit == "%" else f"{value:.2f} ×"
    return Goal(name, goal, f"{shown} ({who})", passes(value))
