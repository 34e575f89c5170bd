"""What training with several kernels and seeds has shown: each kernel beside the first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinyllama.lab.training.from_scratch import Run

# Student's t, 97.5%, by degrees of freedom (Student 1908); more seeds than that take the last.
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Finding:
    """A kernel beside the first one, at equal tokens.

    Attributes:
        kernel: its name.
        loss: mean over seeds of the final held-out loss, in nats a token.
        worse: by how much its loss is above the first one's, as a share, paired by seed.
        margin: half of the 95% interval of that, by Student's t; None with one seed.
        faster: tokens a second over the first one's, less 1.
        tokens_per_second: of training, timed in turn.
        saved_bytes: see Run.
    """

    kernel: str
    loss: float
    worse: float
    margin: float | None
    faster: float
    tokens_per_second: float
    saved_bytes: int

    def __str__(self) -> str:
        """A verdict in plain words."""
        share = f"{abs(self.worse):.1%}" + ("" if self.margin is None else f" ± {self.margin:.1%}")
        if self.margin is not None and abs(self.worse) <= self.margin:
            learns = f"learns as well, as far as these seeds tell ({self.worse:+.1%} ± {self.margin:.1%})"
        elif abs(self.worse) < 0.0005:
            learns = "learns as well"
        else:
            learns = f"learns {share} {'worse' if self.worse > 0 else 'better'} at equal tokens"
        speed = f"{abs(self.faster):.0%} {'faster' if self.faster > 0 else 'slower'}"
        return f"{self.kernel} {learns}, {speed if abs(self.faster) >= 0.005 else 'as fast'}"


def findings(runs: Mapping[str, Sequence[Run]], speeds: Mapping[str, float]) -> list[Finding]:
    """Every kernel beside the first one.

    Args:
        runs: by kernel, each in the order of the seeds.
        speeds: by kernel, tokens a second.
    """
    first, *_ = runs.values()
    base_speed = next(iter(speeds.values()))
    found = []
    for kernel, own in runs.items():
        shares = [
            mine.held_out[-1][1] / base.held_out[-1][1] - 1 for mine, base in zip(own, first, strict=True)
        ]
        margin = None
        if len(shares) > 1:
            t = T975[min(len(shares) - 2, len(T975) - 1)]
            margin = t * statistics.stdev(shares) / math.sqrt(len(shares))
        found.append(
            Finding(
                kernel,
                statistics.mean(run.held_out[-1][1] for run in own),
                statistics.mean(shares),
                margin,
                speeds[kernel] / base_speed - 1,
                speeds[kernel],
                max(run.saved_bytes for run in own),
            )
        )
    return found
