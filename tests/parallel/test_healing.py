"""Several ranks that share a step's windows train to the same bits as one process."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.marks import slow, unix
from tests.parallel.test_ends import LAUNCH, ended, small, start
from tests.parallel.together import Meeting, Threads, in_threads, run_in_threads
from tests.shapes import some_ids, tiny_model
from tinyllama.errors import InputError
from tinyllama.lab.change import Change
from tinyllama.lab.healed import Healed, Settings, load_healed
from tinyllama.lab.healing import heal, whole
from tinyllama.lab.kernel_file import load_kernel
from tinyllama.lab.training import steps as steps_module
from tinyllama.model import Llama
from tinyllama.parity.scene import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["small"]  # the fixture

KERNEL = "window:size=4"
CHANGE = Change(KERNEL, load_kernel(KERNEL), (1, 3))
TEXT = some_ids(1, 90)[0].tolist()
SETTINGS = Settings(KERNEL, (1, 3), None, "a text", batch=4, length=16, lr=1e-2)


def healed(steps: int, ranks: Threads | None = None, begun: Healed | None = None, **changes: Any) -> Healed:
    """The state after the last step, in tensors of its own."""
    with torch.enable_grad():
        states = heal(tiny_model(), CHANGE, TEXT, replace(SETTINGS, **changes), steps, begun, ranks)
        return copy.deepcopy(deque(states, maxlen=1)[0])


def on_ranks(size: int, steps: int, begun: Healed | None = None, **how: Any) -> list[Healed]:
    kind = how.pop("kind", Threads)
    meeting = Meeting(size)
    return run_in_threads(size, meeting, lambda rank: healed(steps, kind(meeting, rank, size), begun, **how))


def assert_equal(one: Healed, other: Healed) -> None:
    assert one.losses == other.losses
    for mine, theirs in ((one.weights, other.weights), (one.moments, other.moments)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_any_number_of_ranks_gives_the_bits_of_one_process(size):
    one = healed(3)
    for state in on_ranks(size, 3):
        assert_equal(state, one)


def test_a_run_goes_on_with_the_same_bits_on_another_number_of_ranks():
    one = healed(4)
    (begun, *_) = on_ranks(3, 1)
    begun = healed(2, begun=begun)
    for state in on_ranks(2, 4, begun):
        assert_equal(state, one)


def wide(model: Llama, begun: Healed | None = None, steps: int = 3) -> Healed:
    """As `healed`, of a model in float64 that may be shared; the state is whole."""
    with torch.enable_grad():
        for state in heal(model, CHANGE, TEXT, SETTINGS, steps, begun):
            found = copy.deepcopy(whole(state, model))
    return found


def assert_close(one: Healed, other: Healed) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-9)
    assert one.weights.keys() == other.weights.keys()
    assert one.moments.keys() == other.moments.keys()
    for name, weight in (one.weights | one.moments).items():
        assert relative_error(weight, (other.weights | other.moments)[name]) < 1e-6, name


@pytest.mark.parametrize(
    ("size", "split", "stages"), [(2, "exact", 1), (5, "exact", 1), (2, "fast", 1), (4, "fast", 2)]
)
def test_a_shared_model_trains_as_a_whole_one_and_either_goes_on_from_the_other(size, split, stages):
    """To rounding: a shared model's gradients are added in another order."""
    model = tiny_model(dtype=torch.float64, num_key_value_heads=4)
    begun, one = wide(model, steps=2), wide(model)
    alone = wide(copy.deepcopy(model), begun)  # to the bit, as above
    assert_close(alone, one)
    for state in in_threads(model, size, wide, split, stages):
        assert_close(state, one)
    for state in in_threads(model, size, lambda part: wide(part, begun), split, stages):
        assert_close(state, one)
    (shared, *_) = in_threads(model, size, lambda part: wide(part, steps=2), split, stages)
    assert_close(wide(model, shared), one)


def test_gradients_of_a_shared_model_are_clipped_by_the_norm_of_all(monkeypatch):
    """The norm of a rank's own part is smaller, so that less would be clipped."""
    monkeypatch.setattr(steps_module, "CLIP", 1e-3)
    model = tiny_model(dtype=torch.float64)
    one = wide(model, steps=1)
    for size, split, stages in ((2, "exact", 1), (4, "exact", 2), (8, "exact", 1)):
        for state in in_threads(model, size, lambda part: wide(part, steps=1), split, stages):
            assert_close(state, one)


def test_a_kernel_with_weights_is_refused_in_a_shared_model():
    def refused(part: Llama) -> str:
        with pytest.raises(InputError) as caught:
            next(heal(part, replace(CHANGE, kernel=Scale()), TEXT, SETTINGS, 1))
        return str(caught.value)

    for said in in_threads(tiny_model(), 2, refused):
        assert said.startswith(f"{KERNEL}: has weights of its own")


class Late(Threads):
    """Gradients come in another order."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        return super().gather(x, widths)[::-1]


class Own(Threads):
    """Each rank takes its own window for every other."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        super().gather(x, widths)
        return [x] * self.size


@pytest.mark.parametrize("kind", [Late, Own])
def test_a_planted_bug_changes_the_bits(kind):
    one = healed(2)
    (state, *_) = on_ranks(3, 2, kind=kind)
    assert not all(torch.equal(state.weights[name], one.weights[name]) for name in one.weights)


class Scale(nn.Module):
    """A kernel with a weight, drawn anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        return CHANGE.kernel(q * self.scale, k, v, context)


def test_a_kernel_s_own_weights_begin_as_on_rank_0_and_are_trained():
    kernels = [Scale(), Scale()]
    assert kernels[0].scale != kernels[1].scale

    def trained(kernel: Scale, ranks: Threads | None = None) -> Healed:
        with torch.enable_grad():
            states = heal(tiny_model(), replace(CHANGE, kernel=kernel), TEXT, SETTINGS, 2, None, ranks)
            return copy.deepcopy(deque(states, maxlen=1)[0])

    meeting = Meeting(2)
    one = trained(kernels[0])
    assert one.weights["layers.1.self_attn.kernel.scale"] != kernels[0].scale
    for state in run_in_threads(2, meeting, lambda rank: trained(kernels[rank], Threads(meeting, rank, 2))):
        assert_equal(state, one)


class Sometimes(nn.Module):
    """A kernel that uses its weight for some windows only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        used = q.flatten()[0] > 0
        return CHANGE.kernel(q * self.scale if used else q, k, v, context)


def test_a_weight_that_some_windows_leave_unused_has_the_gradient_of_the_others():
    def trained(ranks: Threads | None = None) -> Healed:
        change = replace(CHANGE, kernel=Sometimes())
        with torch.enable_grad():
            states = heal(tiny_model(), change, TEXT, SETTINGS, 3, None, ranks)
            return copy.deepcopy(deque(states, maxlen=1)[0])

    one, meeting = trained(), Meeting(3)
    assert one.weights["layers.1.self_attn.kernel.scale"] != 1.5
    for state in run_in_threads(3, meeting, lambda rank: trained(Threads(meeting, rank, 3))):
        assert_equal(state, one)


@pytest.mark.parametrize("what", ["kernel", "state to begin with"])
def test_ranks_that_begin_unlike_are_refused(what):
    meeting, begun = Meeting(2), healed(1)

    def begin(rank: int) -> str:
        other = what == "kernel" and rank == 1
        change = replace(CHANGE, kernel=load_kernel("window:size=5" if other else KERNEL))
        known = None if what == "kernel" or rank == 1 else begun
        with pytest.raises(InputError) as caught, torch.enable_grad():
            next(heal(tiny_model(), change, TEXT, SETTINGS, 2, known, Threads(meeting, rank, 2)))
        return str(caught.value)

    for said in run_in_threads(2, meeting, begin):
        assert f"expected the same {what} on all of them" in said


@slow
def test_the_script_writes_the_same_file_on_any_number_of_processes(small, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog lay on the rug. " * 30)

    def file(name: str, *runs: tuple[int, int]) -> bytes:
        """Of runs, each on a number of processes up to a number of steps."""
        for size, steps in runs:
            options = ["--text", str(text), "--steps", str(steps), "--length", "32", "--batch", "3"]
            place = ["--layers", "1", "--held-out", "64", "--out", str(tmp_path / name)]
            launch = LAUNCH if size > 1 else [sys.executable]
            command = ["scripts/heal.py", KERNEL, *options, *place, "--model", str(small)]
            status, out, err = ended(start(*command, launch=launch))
            assert (status, out.count("healed")) == (0, 1), err
        return Path(tmp_path / name).read_bytes()

    assert file("one", (1, 3)) == file("two", (2, 2), (1, 3))


@slow
@unix
def test_ctrl_c_ends_after_the_step_on_all_processes_and_saves_once(small, tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the dog lay on the rug. " * 60)
    options = ["--text", str(tmp_path / "text.txt"), "--steps", "1000", "--save-every", "1000"]
    place = ["--layers", "1", "--length", "32", "--out", str(tmp_path / "out")]
    process = start("scripts/heal.py", KERNEL, *options, *place, "--model", str(small))
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("100 of"):
        assert line
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = ended(process)
    assert status == 130
    assert out.count("healed") == 1, err
    steps = len(load_healed(tmp_path / "out").losses)
    assert 100 <= steps < 1000
    assert err.endswith(f"wrote {tmp_path / 'out'}, {steps} steps\n")
