"""Two kernels in one layer: some heads by the one, the rest by the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinyllama.attention import AttentionContext, Kernel, kernel_name

Tapped = Callable[[Tensor], Tensor]


class ByHead(nn.Module):
    """A kernel in which some query heads attend by `kernel` and the others by `others`.

    Both compute all heads, so that each kernel sees the layer as it is (head numbers, groups); half of the
    work is thrown away. Taps get one value in which every head is by its own kernel; where only one of the
    two has scores, all heads of that value are by that one.
    """

    def __init__(self, kernel: Kernel, heads: Iterable[int], others: Kernel) -> None:
        super().__init__()
        self.kernel, self.heads, self.others = kernel, tuple(heads), others

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """As any kernel."""
        chosen = torch.tensor([head in self.heads for head in range(q.shape[1])], device=q.device)
        chosen = chosen[:, None, None]  # (H, 1, 1)
        scores_of_others, scores = _merged(context.scores, chosen)
        pattern_of_others, pattern = _merged(context.pattern, chosen)
        z = self.others(q, k, v, replace(context, scores=scores_of_others, pattern=pattern_of_others))
        return torch.where(chosen, self.kernel(q, k, v, replace(context, scores=scores, pattern=pattern)), z)

    @property
    def __name__(self) -> str:
        """For print(model)."""
        heads = ", ".join(map(str, self.heads))
        return f"{kernel_name(self.kernel)} in heads {heads}, {kernel_name(self.others)} in the others"


def _merged(tap: Tapped, chosen: Tensor) -> tuple[Tapped, Tapped]:
    """The tap for each kernel: the others' value comes first, and is kept to complete the second one."""
    seen: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        seen.append(x)
        return tap(x)

    def then(x: Tensor) -> Tensor:
        return tap(torch.where(chosen, x, seen[-1]) if seen else x)

    return first, then
