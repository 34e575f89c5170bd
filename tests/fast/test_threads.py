"""One thread computes while others come late, and afterwards as many as before."""

import pytest
import torch

import tinyllama
from tinyllama.fast.threads import LONGEST, TRY, Team

TICK = TRY / 200


class Machine:
    """Its time goes on when it is looked at or work is done; it may keep threads waiting."""

    def __init__(self):
        self.now = self.computed = 0.0
        self.busy = False
        self.threads = []  # of each step

    def clock(self):
        self.now += TICK
        self.computed += 0.0 if self.busy else TICK
        return self.now

    def team(self):
        return Team(self.clock, lambda: self.computed)

    def step(self, seconds=0.1):
        self.threads.append(torch.get_num_threads())
        self.now += seconds
        self.computed += seconds * (0.5 if self.busy and torch.get_num_threads() > 1 else 1)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_all_threads_compute_on_a_quiet_machine():
    machine = Machine()
    for _ in machine.team().steps(machine.step() for _ in range(20)):
        assert torch.get_num_threads() == 2
    assert machine.threads == [2] * 20


@pytest.mark.usefixtures("two_threads")
def test_one_thread_computes_while_others_are_late_and_the_number_is_put_back_between_steps():
    machine = Machine()
    machine.busy = True
    for _ in machine.team().steps(machine.step() for _ in range(20)):
        assert torch.get_num_threads() == 2
    assert machine.threads == [1] * 20  # a try comes before the first step


@pytest.mark.usefixtures("two_threads")
def test_who_becomes_late_in_a_step_is_left_out_of_the_next_and_comes_back():
    machine = Machine()
    steps = machine.team().steps(machine.step() for _ in range(100))
    next(steps)
    machine.busy = True
    for _ in range(9):
        next(steps)
    assert machine.threads == [2, 2, *[1] * 8]
    machine.busy = False
    list(steps)
    back = machine.threads.index(2, 2)
    assert machine.threads[back:] == [2] * (100 - back)
    assert (back - 2) * 0.1 < LONGEST


@pytest.mark.usefixtures("two_threads")
def test_tries_become_rare_while_they_fail():
    machine = Machine()
    machine.busy = True
    for _ in machine.team().steps(machine.step() for _ in range(600)):
        pass
    assert machine.threads == [1] * 600
    # A try at every chance, each quarter of a second, would take four times as long.
    assert machine.now - 60 < 60 * TRY


@pytest.mark.usefixtures("two_threads")
def test_the_number_is_put_back_after_an_exception():
    machine = Machine()
    machine.busy = True

    def failing():
        machine.step()
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(machine.team().steps(failing()))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_does_not_change_where_bits_are_to_be_transformers(smollm2_folder, monkeypatch):
    machine = Machine()
    machine.busy = True
    monkeypatch.setattr("tinyllama.fast.threads.team", machine.team())
    for weights, expected in (("exact", {2}), ("stored", {1})):
        model = tinyllama.load_model(smollm2_folder, dtype="float32", device="cpu", weights=weights)
        model.register_forward_hook(lambda *_: machine.step())
        machine.threads.clear()
        list(tinyllama.stream(model, [1, 2, 3], max_new_tokens=3, eos_ids=()))
        assert set(machine.threads) == expected
