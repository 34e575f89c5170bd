"""How much a run of the benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinyllama.bench.measure import Figure


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often.

    Attributes:
        rounds: of speeds; 1 more comes first.
        chart_rounds: of the figures that only a chart shows.
        load_rounds: of loads; 0 leaves them out.
        prompt: tokens before the decode steps that the goals are about.
        steps: decode steps timed.
        contexts: tokens of other contexts; goals compare the first with the last.
        prefills: lengths.
        prefill: the one that the goals are about.
        rows: of the batch; 0 leaves it out.
    """

    rounds: int
    chart_rounds: int
    load_rounds: int
    prompt: int
    steps: int
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    prefill: int
    rows: int

    @property
    def decode(self) -> Figure:
        """The decode figure that counts."""
        return Figure("decode", self.prompt, self.steps)

    @property
    def ends(self) -> tuple[int, ...]:
        """The shortest and the longest of the other contexts; none where there are no two."""
        return (self.contexts[0], self.contexts[-1]) if len(self.contexts) > 1 else ()

    @property
    def figures(self) -> list[Figure]:
        """All figures. The longest prefill comes before the long contexts."""
        half = max(1, self.steps // 2)
        others = [Figure("decode", n, half, n in self.ends) for n in self.contexts if n != self.prompt]
        if self.ends:
            near, far = (Figure("decode", n, half) for n in self.ends)
            others = [replace(far, beside=near) if other == far else other for other in others]
        lengths = sorted({*self.prefills, self.prefill})
        prefills = [Figure("prefill", n, always=n == self.prefill) for n in lengths]
        batch = [Figure("batch", self.rows, half, beside=self.decode)] if self.rows else []
        return [self.decode, *others, *batch, *prefills]


def fitting(lengths: tuple[int, ...], longest: int, more: int = 0) -> tuple[int, ...]:
    """Those that fit a context of `longest` with some tokens more."""
    return tuple(length for length in lengths if length + more <= longest)
