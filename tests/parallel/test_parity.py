"""parity.py on ranks: the shared model is judged beside one process, and a fault of one rank is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.folders import HEAD, write
from tests.marks import slow
from tests.parallel.test_exact import WIDE
from tests.parallel.together import in_processes
from tests.shapes import TINY, some_ids, tiny_model
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parallel.ranks import Ranks
from tinyllama.parity.on_ranks import OnRanks, Shared
from tinyllama.parity.subjects import Checkpoint, Extent
from tinyllama.parity.suite import Suite

pytestmark = pytest.mark.usefixtures("one_thread")

EXTENT = Extent(("float32",), positions=64, prompts=2, greedy_ids=4, seeds=1, sampled_ids=3)
WIDER = replace(EXTENT, dtypes=("float32", "bfloat16"))


class Ids:
    """Each text has the ids that its letters stand for."""

    def encode(self, text: str) -> list[int]:
        return some_ids(1, len(text), 300, seed=len(text))[0].tolist()


class Damaged(OnRanks):
    """Rank 1 has one wrong matrix."""

    def _load(self, shared: Shared) -> Llama:
        model = super()._load(shared)
        if self.ranks.rank == 1:
            model.get_parameter("layers.2.mlp.up_proj.weight").data.mul_(1.01)
        return model


def judged(
    ranks: Ranks, folder: Path, kind: type[OnRanks], split: str, pipeline: int, extent: Extent = EXTENT
) -> Any:
    """The rows, ids and findings of rank 0; the others serve it."""
    on_ranks = kind(ranks, split, pipeline)
    if ranks.rank > 0:
        on_ranks.serve()
        return None
    suite = Suite(on_ranks=on_ranks)
    suite.judge(Checkpoint("tiny", folder, Ids(), {"text": "x" * 64}), KERNELS, extent)  # type: ignore[arg-type]
    on_ranks.end()
    report = suite.report
    return {
        "passed": report.passed,
        "same": {(case.dtype, row.who): row.same_bits for case in report.cases for row in case.rows},
        "ids": {part.what: part.flips for part in report.continuations},
        "found": {(one.who, one.found and one.found.address) for one in report.searches},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = tiny_model(**WIDE)
    tensors = {
        n if n == HEAD else f"model.{n}": t.detach().contiguous() for n, t in model.state_dict().items()
    }
    return write(tmp_path_factory.mktemp("parity") / "model", tensors, **{**TINY, **WIDE})


@pytest.mark.parametrize(
    ("size", "split", "pipeline", "extent"),
    [
        (2, "exact", 1, EXTENT),
        *(pytest.param(*way, WIDER, marks=slow) for way in ((2, "exact", 1), (4, "fast", 2))),
    ],
)
def test_the_shared_model_passes_and_in_the_exact_split_has_the_bits_of_one_process(
    size, split, pipeline, extent, folder, tmp_path
):
    found, *others = in_processes(size, tmp_path / "ranks", judged, folder, OnRanks, split, pipeline, extent)
    assert others == [None] * (size - 1)
    assert found["passed"]
    where = "2 ranks, exact" if split == "exact" else "4 ranks, 2 stages, fast"
    for dtype in extent.dtypes:
        for kernel in KERNELS:
            same = found["same"][dtype, f"tinyllama {kernel}, {where}"]
            assert same or (split == "fast" and same is False)
        assert (dtype, f"tinyllama stored, {where}") in found["same"]
    assert not found["ids"][f"greedy, {where}"]
    assert not found["ids"][f"sampled, {where}"]


def test_a_wrong_matrix_on_one_rank_fails_and_is_named(folder, tmp_path):
    found, _ = in_processes(2, tmp_path / "ranks", judged, folder, Damaged, "exact", 1)
    assert not found["passed"]
    assert ("tinyllama eager, 2 ranks, exact", "layers.2.mlp.up_proj") in found["found"]
    assert not any("ranks" not in who for who, _ in found["found"])
