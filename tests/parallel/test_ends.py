"""How ranks begin and end: refused alike, told in one line, never a hang."""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.folders import HEAD, weights, write
from tests.fast.compiled import compiled
from tests.marks import slow, unix
from tests.parallel import jobs
from tests.parallel.test_exact import WIDE
from tests.parallel.together import in_processes
from tests.shapes import TINY, tiny_model
from tinyllama.cli import options
from tinyllama.errors import InputError
from tinyllama.parallel import ranks as ranks_module
from tinyllama.parallel.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "tinyllama.parallel", "--nproc-per-node", "2"]
SECONDS = 120
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments: str, launch: list[str] = LAUNCH) -> subprocess.Popen[str]:
    """A script, as the first of its own group of processes."""
    return subprocess.Popen(
        [*launch, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], input: str | None = None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; a hang is killed, and fails."""
    try:
        out, err = process.communicate(input, timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


# The handshake


def test_another_checkpoint_code_or_split_on_a_rank_is_refused_alike(tmp_path):
    right = write(tmp_path / "right")
    changed = weights()
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    other = write(tmp_path / "other", changed)
    alike = ["a", "a"], ["exact", "exact"]
    found = in_processes(2, tmp_path / "checkpoint", jobs.refusal, [right, other], *alike)
    assert len(set(found)) == 1
    assert "same checkpoint" in found[0]
    found = in_processes(2, tmp_path / "code", jobs.refusal, [right, right], ["a", "b"], alike[1])
    assert len(set(found)) == 1
    assert "same version of the code" in found[0]
    assert "got a on rank 0 and b on rank 1" in found[0]
    found = in_processes(2, tmp_path / "split", jobs.refusal, [right, right], alike[0], ["exact", "fast"])
    assert len(set(found)) == 1
    assert "same split" in found[0]


def test_ctrl_c_during_a_pass_counts_at_the_next_exchange_and_sending_changes_nothing(tmp_path):
    for rank, found in enumerate(in_processes(2, tmp_path / "ranks", jobs.interrupted)):
        assert found == ["next", [[rank] * 2] * 2, [[1, 1]] * 2]


def test_as_many_bytes_are_received_as_planned(tmp_path):
    for found in in_processes(4, tmp_path / "ranks", jobs.traffic, write(tmp_path / "model")):
        for counted, planned in found:
            assert counted == planned > 0


def test_a_rank_that_does_not_come_is_given_up(tmp_path):
    assert "did not answer within 1 s" in in_processes(2, tmp_path / "ranks", jobs.late)[0]


# Scripts


@pytest.fixture(scope="module")
def small(tmp_path_factory, smollm2_folder) -> Path:
    """A model that is loaded and computes in no time, with the trained one's tokenizer."""
    fields = {**WIDE, "vocab_size": 49152, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    model = tiny_model(**fields)
    tensors = {n if n == HEAD else f"model.{n}": t.detach().clone() for n, t in model.state_dict().items()}
    folder = write(tmp_path_factory.mktemp("small"), tensors, **{**TINY, **fields})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_folder / name, folder)
    return folder


@pytest.mark.parametrize("script", ["generate", pytest.param("chat", marks=slow)])
def test_two_ranks_print_once_what_one_process_prints(script, small):
    command = [f"scripts/{script}.py", "--model", str(small), "-n", "20", "--temperature", "0.8", "--seed=5"]
    typed = "My name is Ada.\nWhat is my name?\n"
    one = ended(start(*command, launch=[sys.executable]), typed)
    assert one[0] == 0
    assert ended(start(*command), typed) == one


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["scripts/generate.py", "--model", "/nowhere", "hi"], "/nowhere"),
        pytest.param(["scripts/tokens.py", "hi"], "one process", marks=slow),
    ],
)
def test_a_refused_input_is_one_line_and_status_2(command, said):
    status, out, err = ended(start(*command))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


def generating(folder: Path) -> subprocess.Popen[str]:
    """Two ranks in the middle of a text."""
    process = start("scripts/generate.py", "--model", str(folder), "-n", "4000", "Once upon a time")
    assert process.stdout is not None
    process.stdout.read(30)
    return process


@unix
def test_ctrl_c_ends_all_ranks_with_130(small):
    process = generating(small)
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = ended(process)
    assert (status, err) == (130, "")
    assert out.endswith("\n")


@slow
@unix
def test_ctrl_c_ends_a_bench_whose_other_ranks_wait(small):
    sizes = ["--rounds", "1000", "--contexts", "4", "--prefill", "0", "--rows", "0", "--steps", "2"]
    process = start("scripts/bench.py", "--model", str(small), *sizes)
    assert process.stderr is not None
    while "load stored-fast" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    status, out, _ = ended(process)
    assert (status, out) == (130, "")


def kill_and_read_one_line(process, rank):
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 1
    assert err.count("\n") == 1
    assert f"rank {rank} was ended by SIGKILL" in err


@unix
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow)])
def test_a_killed_rank_ends_the_others_with_one_line(rank, small):
    process = generating(small)
    kill_and_read_one_line(process, rank)


@slow
@unix
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seed", range(8))
def test_a_rank_killed_at_any_moment_is_told_in_one_line(seed, small):
    draw = random.Random(seed)
    process = start("scripts/generate.py", "--model", str(small), "-n", "4000", "Once upon a time")
    # Up to the first look the ranks import, load, and meet; then they compute.
    characters, looks = draw.choice([0, 0, 20, 200]), draw.randrange(2000)
    assert process.stdout is not None
    process.stdout.read(characters)
    while len(ranks_of(process)) < 2 or (looks := looks - 1) > 0:
        assert process.poll() is None
    rank = draw.randrange(2)
    kill_and_read_one_line(process, rank)


@slow
@unix
def test_plain_torchrun_ends_too_and_a_rank_says_why(small):
    launch = [sys.executable, "-m", "torch.distributed.run", *LAUNCH[3:]]
    process = start("scripts/generate.py", "--model", str(small), "-n", "4000", "Once", launch=launch)
    assert process.stdout is not None
    process.stdout.read(20)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 1
    assert err.count("error: ranks: another rank ended") == 1


@slow
@compiled
def test_a_rank_reads_and_keeps_its_part_alone(smollm2_folder):
    """Its peak is at most 1.15 of its share and 300 MB, which Python and PyTorch take."""
    for how, share in (
        (["--split", "exact"], 258.0),
        (["--split", "fast"], 251.4),
        (["--pipeline", "2"], 269.0),
    ):
        command = ["scripts/generate.py", "--model", str(smollm2_folder), "-n", "4", "--stats", *how]
        status, _, err = ended(start(*command, "Hi"))
        assert status == 0
        peak, read = (
            float(re.search(pattern, err)[1].replace(",", ""))
            for pattern in (r"memory +([\d,]+) MB", r"read ([\d,]+) MB")
        )
        assert read == pytest.approx(share, abs=1)
        assert peak <= 1.15 * share + 300


def test_without_torchrun_there_are_no_ranks_to_join(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="start the script by torchrun"):
        Ranks.from_environment()
    with pytest.raises(InputError, match="--split is for several ranks"):
        options.load(argparse.Namespace(split="fast"))


@slow
@unix
def test_hosts_with_other_options_are_refused_alike(small):
    processes = []
    for number, count in enumerate((["-n", "20"], ["-n", "21"])):
        about = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1"]
        launch = [*LAUNCH[:3], *about, "--master-port", "29513", "--nproc-per-node", "1"]
        processes.append(start("scripts/generate.py", "--model", str(small), *count, "Once", launch=launch))
    (status, out, err), (other, _, _) = map(ended, processes)
    assert (status, out) == (2, "")
    assert err.startswith("error: ranks: expected the same options on all of them, got")
    assert err.count("\n") == 1
    assert other != 0


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a cable between them: name and address of each."""
    both = [(f"tinyllama-{os.getpid()}-{n}", f"10.93.7.{n + 1}") for n in range(2)]
    (one, _), (other, _) = both
    commands = [
        *(f"netns add {name}" for name, _ in both),
        f"link add cable netns {one} type veth peer name cable netns {other}",
    ]
    for name, address in both:
        commands += [f"-n {name} address add {address}/24 dev cable"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", "cable")]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"this system makes no network namespaces: {made.stderr.strip()}")
        yield both
    finally:
        for name, _ in both:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@slow
@unix
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip, of iproute2")
def test_two_hosts_write_the_text_of_one_process_on_the_first(hosts, small):
    script = ["scripts/generate.py", "--model", str(small), "-n", "20", "Once upon a time"]
    one = ended(start(*script, launch=[sys.executable]))
    processes = []
    for number, (name, _) in enumerate(hosts):
        about = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", hosts[0][1]]
        # These hosts have no names, of which PyTorch would warn.
        settings = ["GLOO_SOCKET_IFNAME=cable", "TORCH_CPP_LOG_LEVEL=ERROR"]
        place = ["ip", "netns", "exec", name, "env", *settings]
        launch = [*place, *LAUNCH[:3], *about, "--master-port", "29511", "--nproc-per-node", "1"]
        processes.append(start(*script, launch=launch))
    first, second = map(ended, processes)
    assert first == one
    assert second == (0, "", "")


def test_a_repeated_signal_is_one_and_a_later_one_counts(monkeypatch):
    now, taken = 100.0, []
    monkeypatch.setattr(ranks_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(ranks_module, "_signalled", [0.0])
    first, second = (ranks_module.without_echo(taken.append) for _ in range(2))
    for now, handle in ((100.0, first), (100.2, second), (102.1, first), (110.0, second)):
        handle(now)
    assert taken == [100.0, 110.0]
