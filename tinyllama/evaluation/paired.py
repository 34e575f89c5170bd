"""Two runs on the same documents: every metric, the difference, and how certain it is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from torch import Tensor

from tinyllama.evaluation.tasks import Loaded

Results = Mapping[str, Any]  # what the harness returns
Statistic = Callable[[Tensor], Tensor]  # of a mean

Z = 1.96  # 95%
RESAMPLES = 2000
FEWEST = 5  # with fewer documents a bootstrap interval is too narrow to be worth showing

# The metrics that are a function of a mean, by the name of the harness's function: only these have intervals.
MEANS: dict[str, Statistic] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: (-mean).exp(),
    "weighted_perplexity": lambda mean: (-mean).exp(),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval, for other documents of this kind; and how it was computed."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: its name.
        metric: the harness's name, and after a comma the filter that the answers went through, if any.
        higher_is_better: None: the task does not say.
        documents: how many; None for a group.
        unchanged: the unchanged model's value, as the harness computes it.
        unchanged_interval: of that value; None if there is none.
        changed: the changed model's value; None if there is no changed model.
        difference: changed - unchanged.
        difference_interval: of the difference, by pairs; None if there is none.
        pairs: each document's values under the unchanged and the changed model.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    documents: int | None
    unchanged: float
    unchanged_interval: Interval | None = None
    changed: float | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


def run(lm: LM, tasks: Loaded, limit: int | None = None, chat: bool = False) -> Results:
    """Ask the model everything, as `lm_eval.simple_evaluate` does; each run draws the same examples.

    Args:
        lm: the model, such as a `HarnessModel`.
        tasks: see `tasks.loaded`.
        limit: the first so many documents of each task; None: all.
        chat: put prompts into the model's chat template, with each example as a turn.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    results = evaluate(
        lm,
        tasks,
        limit=limit,
        bootstrap_iters=0,  # its intervals are of one run alone
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert results is not None  # it is None in other processes than the first
    return results


def scores(tasks: Loaded, unchanged: Results, changed: Results | None = None) -> list[Score]:
    """Every metric of every task and group; of two runs, the changed one beside the unchanged one."""
    found = []
    for name, task in tasks["tasks"].items():
        samples = unchanged["samples"][name]
        for filtered in dict.fromkeys(sample["filter"] for sample in samples):
            for metric in dict.fromkeys(one for sample in samples for one in sample["metrics"]):
                columns = [
                    [sample[metric] for sample in run["samples"][name] if sample["filter"] == filtered]
                    for run in (unchanged, changed)
                    if run is not None
                ]
                of = MEANS.get(getattr(task.aggregation()[metric], "__name__", ""))
                found.append(_score(name, metric, filtered, (unchanged, changed), columns, of))
    for name, values in unchanged.get("groups", {}).items():
        for key in values:
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                found.append(_score(name, metric, filtered, (unchanged, changed), [], None))
    return found


def _score(
    name: str,
    metric: str,
    filtered: str,
    runs: tuple[Results, Results | None],
    columns: Sequence[Sequence[Any]],
    of: Statistic | None,
) -> Score:
    """One row; `columns` are the documents' values in each run, `of` makes a metric of their mean."""
    before, after = ({} if run is None else run["results"][name] for run in runs)
    key = f"{metric},{filtered}"
    score = {
        "task": name,
        "metric": metric if filtered == "none" else f"{metric}, {filtered}",
        "higher_is_better": runs[0]["higher_is_better"].get(name, {}).get(metric),
        "documents": len(columns[0]) if columns else None,
        "unchanged": float(before[key]),
    }
    values = [torch.tensor(column, dtype=torch.float64) for column in columns] if of else []
    if values and of:
        score["unchanged_interval"] = interval(values[0], of)
    if runs[1] is not None:
        score |= {"changed": float(after[key]), "difference": float(after[key] - before[key])}
        score["pairs"] = list(zip(*columns, strict=True))
        if values and of:
            score["difference_interval"] = difference_interval(values[0], values[1], of)
    return Score(**score)


def interval(values: Tensor, of: Statistic) -> Interval | None:
    """The interval of a metric in one run: Wilson's of right and wrong answers, else a bootstrap.

    Args:
        values: (N,) of each document, or (N, 2): log-likelihoods, and the words or bytes that they are of.
        of: the metric, as a function of the values' mean; of (N, 2), of the ratio of their sums.
    """
    if not _right_or_wrong(values, of):
        return _bootstrap([values], lambda means: of(means[0]))
    n, p = len(values), values.mean().item()
    # Wilson 1927, "Probable inference": an interval that is not 0 wide if all answers are right.
    centre, width = (p + Z**2 / (2 * n)), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Interval((centre - width) / (1 + Z**2 / n), (centre + width) / (1 + Z**2 / n), "Wilson")


def difference_interval(before: Tensor, after: Tensor, of: Statistic) -> Interval | None:
    """The interval of the difference of a metric between two runs on the same documents.

    Of right and wrong answers (0 and 1) it is the adjusted Wald interval for matched pairs (Agresti & Min
    2005, Statistics in Medicine 24:729): with half a document more in each cell of the two-by-two table, it
    is not 0 wide where no answer changed. Of other values it is a percentile bootstrap that draws documents
    with both their values (Efron & Tibshirani 1993, chapter 13; Koehn 2004 for benchmarks), from five
    documents on.

    Args:
        before: (N,) or (N, 2), as in `interval`.
        after: of the same documents in the same order.
        of: as in `interval`.
    """
    if not (_right_or_wrong(before, of) and _right_or_wrong(after, of)):
        return _bootstrap([before, after], lambda means: of(means[1]) - of(means[0]))
    gained = ((after > before).sum() + 0.5).item()
    lost = ((after < before).sum() + 0.5).item()
    n = len(before) + 2
    centre = (gained - lost) / n
    width = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return Interval(max(centre - width, -1.0), min(centre + width, 1.0), "Agresti-Min")


def _right_or_wrong(values: Tensor, of: Statistic) -> bool:
    return of is MEANS["mean"] and values.dim() == 1 and bool(((values == 0) | (values == 1)).all())


def _bootstrap(columns: Sequence[Tensor], statistic: Statistic) -> Interval | None:
    """Of a statistic of the columns' means, (R, 1) each, for R resamples of the documents."""
    n = len(columns[0])
    if n < FEWEST or any(column.isnan().any() for column in columns):
        return None
    # (runs, N, 2): each document's sum, and its weight.
    table = torch.stack([c if c.dim() == 2 else torch.stack([c, torch.ones_like(c)], -1) for c in columns])
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(RESAMPLES):  # one by one: all indices at once would be gigabytes for some tasks
        sums = table[:, torch.randint(n, (n,), generator=generator)].sum(1)
        drawn.append(statistic(sums[:, 0] / sums[:, 1]))
    low, high = torch.stack(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high, "bootstrap")
