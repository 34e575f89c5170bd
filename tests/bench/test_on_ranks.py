"""The bench on several ranks: the model that they share is measured beside the same in one process."""

from __future__ import annotations

import json
import sys

import pytest

from tests.fast.compiled import compiled
from tests.marks import slow
from tests.parallel import jobs
from tests.parallel.test_ends import ended, start
from tests.parallel.together import in_processes
from tests.scripts.test_scripts import load_script
from tests.shapes import tiny_config
from tinyllama.bench.measure import Plan
from tinyllama.bench.peers import DEFAULT_ON_RANKS, Setup
from tinyllama.bench.random_checkpoint import write_random_checkpoint
from tinyllama.bench.table import span
from tinyllama.parallel.plan import Plan as Sharing

CHANGES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
CONFIG = tiny_config(**CHANGES)
SIZE, SPLITS = 2, ("exact", "fast")
NORM_BYTES = (2 * CONFIG.num_hidden_layers + 1) * CONFIG.hidden_size * 2  # in the file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random bfloat16 weights."""
    made = tmp_path_factory.mktemp("bench")
    write_random_checkpoint(CONFIG, made)
    return made


@compiled
def test_what_sharing_costs_is_measured_beside_one_process(tmp_path, folder):
    plan = Plan(rounds=1, load_rounds=0, steps=2, contexts=(6,), prefill=8, rows=3)
    setup = Setup(str(folder), str(folder), "cpu", "float32", plan.longest, threads=2 * SIZE, ranks_here=SIZE)
    first, second = in_processes(SIZE, tmp_path / "ranks", jobs.benched, setup, list(DEFAULT_ON_RANKS), plan)
    whole, *shared = first["peers"]
    assert (whole["name"], whole["threads"], whole["sharing"]) == ("stored", 2 * SIZE, None)
    assert [peer["name"] for peer in shared] == ["stored-exact", "stored-fast"]

    parameters = sum(CONFIG.parameters.values())
    for peer, split in zip(shared, SPLITS, strict=True):
        found, planned = peer["sharing"], Sharing.of(CONFIG, SIZE, split).received(4)
        planned -= 2 * CONFIG.hidden_size  # a row of the table is sent as it is kept, in bfloat16
        assert (found["ranks"], found["split"], peer["threads"]) == (SIZE, split, 2)
        assert list(peer["speeds"]) == list(whole["speeds"])
        # Only norms are on every rank.
        assert sum(found["bytes_read"]) == 2 * parameters + (SIZE - 1) * NORM_BYTES
        assert all(0 < share < 1 for shares in found["in_collectives"].values() for share in shares)
        # One rank at least waits for most of a small model's time, which itself is milliseconds.
        assert all(max(shares) > 0.05 for shares in found["in_collectives"].values())
        assert [len(shares) for shares in found["in_collectives"].values()] == [SIZE] * 3
        received = found["received"]
        assert received["decode at 6"] == received["batch of 3"] == planned
        head = 4 * CONFIG.vocab_size / SIZE  # for the last token of a prompt alone
        assert received["prefill of 8"] == planned - head + head / 8

    # What a step of both ranks reads is what one process reads, and the norms again.
    table = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    cached = 4 * 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim
    one = 2 * parameters - table + NORM_BYTES  # float32 norms
    for peer, size in (whole, one), (shared[0], one + (SIZE - 1) * 2 * NORM_BYTES):
        share, speed = peer["bandwidth_shares"]["decode at 6"], peer["speeds"]["decode at 6"]["median"]
        assert share * first["bandwidth"]["median"] / speed == pytest.approx(size + 6 * cached)

    texts = [first["texts"][at :: 1 + len(SPLITS)] for at in range(1 + len(SPLITS))]
    ids = [[text["ids"] for text in one] for one in texts]
    assert [len(one) for one in ids[0]] == [plan.steps + 2] * (plan.rounds + 1)
    assert ids[0] == ids[1]  # one process, and the exact split
    assert [text["ids"] for text in second["texts"][:: len(SPLITS)]] == ids[1]
    # Others would be late: one process notices, and a rank does not take its own waiting for that.
    assert [{n for text in one for n in text["threads"]} for one in texts] == [{1}, {2}, {2}]
    assert first["threads"] == 2 * SIZE


@slow
def test_the_command_prints_and_writes_what_the_ranks_share(folder, tmp_path):
    sizes = ["--rounds", "1", "--steps", "2", "--contexts", "4", "--prefill", "0", "--rows", "0"]
    status, out, _ = ended(
        start("scripts/bench.py", "--model", str(folder), *sizes, "--json", str(tmp_path / "bench.json"))
    )
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["run"]["command"].startswith("torchrun --nproc-per-node 2 scripts/bench.py --model")
    assert [peer["name"] for peer in found["peers"]] == list(DEFAULT_ON_RANKS)
    speeds, sharing = out.split("tokens/s")[1].split("in collectives ")
    for peer, threads in zip(found["peers"], ("2", "2 × 1", "2 × 1"), strict=True):
        assert peer["load"] is None
        assert f"{peer['name']:<13}{threads:>7}" in speeds
        if cost := peer["sharing"]:
            (row,) = (line for line in sharing.splitlines() if line.startswith(peer["name"]))
            (shares,) = cost["in_collectives"].values()
            assert f"{100 * max(shares):.0f}%" in row
            assert f"{cost['received']['decode at 4'] / 1e3:.1f}" in row
            assert all(0 < share < 1 for share in shares)
    assert out.count("stored-fast") == 2  # rank 0 alone prints


@pytest.mark.parametrize(
    ("values", "expected"), [([41.6, 58.2, 50], "42 to 58%"), ([58.2, 41.6], "42 to 58%"), ([7, 7.2], "7%")]
)
def test_the_least_and_the_largest_value_of_the_ranks_are_shown(values, expected):
    assert span(values, "%") == expected


@pytest.fixture
def refused(monkeypatch, capfd):
    """What the first of two ranks says of its options."""

    def run(*options, here=2):
        environment = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": here, "RANK": "0"}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["bench.py", *options])
        with pytest.raises(SystemExit) as exit:
            load_script("bench").parse()
        assert exit.value.code == 2
        return capfd.readouterr().err

    return run


@pytest.mark.parametrize("options", [["--profile"], ["--load-rounds", "2"]])
def test_what_one_process_alone_can_measure_is_refused(refused, options):
    said = refused(*options)
    assert said.count("\n") == 1
    assert options[0] in said


def test_random_weights_are_for_one_machine(refused):
    said = refused("--quick", here=1)
    assert said.count("\n") == 1
    assert "--model: expected a folder that every machine has" in said
