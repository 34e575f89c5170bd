"""The benchmark measures what it says: in turn, on the same weights, with the right bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import tinyllama
from tests.scripts.test_judging_scripts import assert_refused
from tests.scripts.test_scripts import load_script
from tests.shapes import LLAMA3_SCALING, tiny_config, tiny_model
from tinyllama import InputError, LlamaConfig
from tinyllama.bench import gguf_file, loads, measure, profile
from tinyllama.bench.measure import Plan
from tinyllama.bench.peers import Setup, make_peer
from tinyllama.bench.random_checkpoint import write_random_checkpoint
from tinyllama.bench.results import Rate
from tinyllama.bench.torch_peers import weight_bytes
from tinyllama.checkpoints.embedded import unpermute
from tinyllama.cli import terminal
from tinyllama.parity.reference import reference_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Widths that the compiled products take, and Q8_0's blocks.
CHANGES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
L, C, F, H, K, D, V = 2, 128, 192, 8, 2, 16, 320
MATRICES = L * ((2 * H + 2 * K) * D * C + 3 * F * C) + V * C  # without the embedding table
NORMS = (2 * L + 1) * C
LITTLE_WORK = {"read_bytes": 1_000_000, "product": (8, 16, 16)}
SMALL = ("--rounds", 2, "--load-rounds", 0, "--steps", 2, "--contexts", "4,8", "--prefill", 16, "--rows", 2)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A checkpoint with random bfloat16 weights."""
    folder = tmp_path_factory.mktemp("bench")
    write_random_checkpoint(tiny_config(**CHANGES), folder)
    return Setup(str(folder), str(folder), "cpu", "float32", context=40, threads=1)


def loaded(name, setup):
    peer = make_peer(name, setup)
    peer.load()
    return peer


@pytest.fixture
def bench(monkeypatch, capfd, tmp_path, setup):
    """Runs the script on the tiny checkpoint; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "Limits", partial(measure.Limits, **LITTLE_WORK))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--model", setup.folder, *map(str, options)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            terminal.run(load_script("bench").main)
        out, err = capfd.readouterr()
        return exit.value.code, out, err

    return run


# --- rounds ----------------------------------------------------------------------------------------------


class Recorder:
    """A peer, and the machine's limits, that note when they are asked."""

    def __init__(self, name, calls, batches=True):
        self.name, self.calls, self.batches = name, calls, batches

    def prefill(self, length):
        self.calls.append((self.name, "prefill", length))

    def decode(self, context, steps):
        self.calls.append((self.name, "decode", context, steps))
        return iter(range(steps))

    def batch(self, rows, steps):
        self.calls.append((self.name, "batch", rows, steps))

    def read_bandwidth(self):
        self.calls.append("read")
        return 1.0

    def product_rate(self, dtype):
        self.calls.append(dtype)
        return 2.0


def test_each_round_measures_each_figure_of_each_peer_in_turn_beside_the_limits():
    calls = []
    peers = [Recorder("a", calls), Recorder("b", calls, batches=False)]
    plan = Plan(rounds=3, load_rounds=0, steps=5, contexts=(4, 64), prefill=8, rows=2)
    found = measure.interleave(peers, plan, Recorder("machine", calls))
    one_round = [
        *("float32", "bfloat16"),
        *("read", ("a", "decode", 4, 7), ("b", "decode", 4, 7)),
        *("read", ("a", "decode", 64, 7), ("b", "decode", 64, 7)),
        *("read", ("a", "prefill", 8), ("b", "prefill", 8)),
        *("read", ("a", "batch", 2, 5)),
    ]
    assert calls == one_round * 4
    assert {len(values) for by_figure in found.taken.values() for values in by_figure.values()} == {3}
    assert list(map(str, found.taken["a"])) == ["decode at 4", "decode at 64", "prefill of 8", "batch of 2"]
    assert list(map(str, found.taken["b"])) == ["decode at 4", "decode at 64", "prefill of 8"]
    assert len(found.read) == 3 * 4
    assert found.products == {"float32": [2.0] * 3, "bfloat16": [2.0] * 3}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], (5, 5, 5, 0)),
        ([4.0, 1.0, 100.0, 2.0, 3.0], (3, 1, 100, 1 / 3)),
        ([1.0, 2.0], (1.5, 1, 2, 1 / 6)),
    ],
)
def test_a_rate_has_the_median_the_extremes_and_the_quartiles_distance(values, expected):
    rate = Rate.of(values)
    assert (rate.median, rate.slowest, rate.fastest, rate.spread) == pytest.approx(expected)
    assert rate.rounds == values


def test_busy_processes_run_until_the_measurement_ends():
    with measure.busy(2) as spinners:
        assert [spinner.poll() for spinner in spinners] == [None, None]
    assert None not in [spinner.poll() for spinner in spinners]


# --- peers -----------------------------------------------------------------------------------------------


def test_transformers_decodes_the_ids_of_our_exact_mode_and_both_can_start_again(setup):
    ours, theirs = loaded("exact", setup), loaded("transformers-float32", setup)
    (expected,) = tinyllama.generate(ours.model, [ours.ids[:20]], max_new_tokens=6, eos_ids=())
    for peer in (ours, theirs):
        assert list(peer.decode(20, 6)) == expected
        assert list(peer.decode(7, 2)) != expected[:2]
        assert list(peer.decode(20, 6)) == expected  # the cache is put back, not continued
        assert peer.prefill(20) == expected[0]
        peer.batch(3, 2)
    assert ours.weight_bytes == theirs.weight_bytes
    assert ours.cached_bytes == theirs.cached_bytes == 2 * L * K * D * 4


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        *[("exact", 4), ("float32", 4), ("stored", 2), ("bfloat16", 2), ("float16", 2)],
        *[("int8", 1 + 2 / 64), ("transformers-bfloat16", 2)],
    ],
)
def test_a_step_reads_every_weight_but_the_embedding_table(setup, name, matrices):
    peer = loaded(name, setup)
    norms = 2 if name == "transformers-bfloat16" else 4
    assert peer.weight_bytes == MATRICES * matrices + NORMS * norms
    assert peer.cached_bytes == 2 * L * K * D * norms
    tied = tiny_model(tie_word_embeddings=True)
    assert weight_bytes(tied) == 4 * tied.num_parameters()  # then the table is the head, too


def test_a_load_is_timed_in_a_process_of_its_own(setup):
    found = loads.load_in_fresh_process("stored", setup)
    assert 0 < found.seconds < found.with_imports
    assert found.peak_bytes > 0


def test_the_median_of_loads_is_that_of_each_figure():
    found = loads.middle([loads.Load(1, 5, 30), loads.Load(2, 4, 10), loads.Load(3, 9, 20)])
    assert found == loads.Load(2, 5, 20)
    assert loads.middle([loads.Load(1, 5, None)]).peak_bytes is None


def test_a_load_is_timed_before_torch_is_imported():
    code = "import sys, tinyllama.bench.loads, tinyllama.bench.llama_cpp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- llama.cpp -------------------------------------------------------------------------------------------


def test_unpermute_undoes_permute():
    weight = torch.randn(4 * 6, 5)
    permuted = gguf_file.permute(weight, 4)
    assert not torch.equal(permuted, weight)
    assert torch.equal(torch.from_numpy(unpermute(permuted.numpy(), 4)), weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "bits", "error"), [("F16", 16, 3e-3), ("Q8_0", 8.5, 4e-2)])
def test_llama_cpp_gives_our_logits_on_the_gguf_file(tmp_path, setup, kind, bits, error, tied):
    # pip compiles it for minutes, so it is not among the requirements of `make test`.
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; make bench-peers does")
    model = tiny_model(**CHANGES, tie_word_embeddings=tied)
    reference_model(model, "eager").save_pretrained(tmp_path)
    theirs = loaded(f"llama.cpp-{kind}", Setup(str(tmp_path), str(tmp_path), "cpu", "float32", 40, 1))
    assert theirs.weight_bytes == pytest.approx(MATRICES * bits / 8 + 4 * NORMS, rel=0.1)
    for length in (5, 30):
        theirs.prefill(length)
        with torch.inference_mode():
            ours = model(torch.tensor([theirs.ids[:length]]))[0, -1]
        assert (torch.from_numpy(theirs.logits()) - ours).norm() / ours.norm() < error
    expected = list(theirs.decode(20, 6))
    assert list(theirs.decode(20, 6)) == expected


def test_a_gguf_file_holds_every_tensor_in_its_kind(tmp_path, setup):
    import gguf

    gguf_file.write_gguf(Path(setup.folder), tmp_path / "model.gguf", "Q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 3 + 9 * L
    kinds = {tensor.tensor_type.name for name, tensor in tensors.items() if name.endswith("norm.weight")}
    assert kinds == {"F32"}
    head = tensors["output.weight"]
    assert (head.tensor_type.name, list(head.shape)) == ("Q8_0", [C, V])


def test_a_shape_that_gguf_cannot_hold_is_refused(tmp_path):
    write_random_checkpoint(tiny_config(**CHANGES), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type": "llama3", **LLAMA3_SCALING}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    with pytest.raises(InputError, match="rope_scaling"):
        gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf", "F16")


# --- where the time goes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "stored", "transformers-float32"])
def test_operations_sum_to_the_step_and_read_what_it_reads(setup, name):
    peer = loaded(name, setup)
    plan = Plan(rounds=2, load_rounds=0, steps=4, contexts=(30,), prefill=0, rows=0)
    found = profile.profile(peer, 30, plan)
    by_name = {operation.name: operation for operation in found.operations}
    assert sum(operation.seconds for operation in found.operations) == pytest.approx(found.watched_seconds)
    assert all(operation.seconds > 0 for operation in found.operations)
    assert (
        sum(operation.bytes for operation in found.operations) == peer.weight_bytes + 30 * peer.cached_bytes
    )
    assert by_name["lm_head"].bytes == V * C * (2 if name == "stored" else 4)
    assert by_name[profile.ATTENTION].bytes == 30 * peer.cached_bytes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in peer.model.modules())


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_writes_a_table_json_and_a_chart(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    peers = ("stored", "transformers-float32", "llama.cpp-F16")
    status, out, err = bench(
        *SMALL, "--busy", 1, "--png", "bench.png", "--json", "bench.json", "--peers", *peers
    )
    assert status == 0
    assert err.endswith("wrote bench.json\nwrote bench.png\n")
    assert max(map(len, out.splitlines())) <= 100
    assert "in collectives" not in out  # a table for ranks alone
    assert 'llama.cpp-F16 is left out: llama_cpp is not installed: pip install "tinyllama[bench]"' in out

    found = json.loads((tmp_path / "bench.json").read_text(), parse_constant=pytest.fail)
    table = out[out.index("tokens/s") :]
    assert [peer["name"] for peer in found["peers"]] == ["stored", "transformers-float32"]
    for peer in found["peers"]:
        assert (peer["threads"], peer["sharing"]) == (1, None)
        assert list(peer["speeds"]) == ["decode at 4", "decode at 8", "prefill of 16", "batch of 2"]
        for rate in peer["speeds"].values():
            assert len(rate["rounds"]) == 2
            assert rate["slowest"] == min(rate["rounds"])
        decode = peer["speeds"]["decode at 4"]["median"]
        cells = table[table.index(peer["name"]) :].split()
        assert float(cells[1].replace(",", "")) == pytest.approx(decode, rel=0.01)
    (mine, _), read = found["peers"], found["bandwidth"]["median"]
    bytes_read = MATRICES * 2 + NORMS * 4 + 8 * 2 * L * K * D * 4
    share = mine["speeds"]["decode at 8"]["median"] * bytes_read / read
    assert mine["bandwidth_shares"]["decode at 8"] == pytest.approx(share)
    assert found["run"]["busy"] == 1
    assert found["run"]["machine"]["threads"] == 1
    assert found["run"]["command"].startswith("python scripts/bench.py --model")

    pixels = imread(tmp_path / "bench.png")[..., :3]
    width = pixels.shape[1]
    for panel in range(4):  # a bar of each implementation
        part = pixels[:, panel * width // 4 : (panel + 1) * width // 4].reshape(-1, 3)
        for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
            assert (abs(part - [value / 255 for value in colour]).max(axis=1) < 0.02).sum() > 100


def test_a_profile_is_printed_or_written(bench):
    options = ("--profile", "--rounds", 1, "--steps", 2, "--contexts", 10, "--peers", "int8")
    status, out, _ = bench(*options, "--prefill", 0)
    assert status == 0
    assert "gate, up, down projections" in out
    found = json.loads(bench(*options, "--prefill", 0, "--json", "-")[1])
    assert [(part["peer"], part["context"]) for part in found["profiles"]] == [("int8", 10)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--peers", "nobody"], "'nobody'"),
        (["--peers", "stored", "stored-fast"], "stored-fast is for several ranks"),
        (["--profile", "--png", "a.png"], "--png"),
        (["--profile", "--peers", "llama.cpp-F16"], "--profile"),
        (["--png", "absent/a.png"], "make the folder first"),
        (["--json", "absent/a.json"], "make the folder first"),
        (["--contexts", "300"], "context of 256"),
        (["--contexts", "0"], "--contexts"),
        (["--rounds", "0"], "1 or more"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(bench, options, expected):
    assert_refused(bench(*options), expected)


@pytest.mark.parametrize(
    ("package", "options"), [("matplotlib", ("--png", "a.png")), ("llama_cpp", ("--peers", "llama.cpp-F16"))]
)
def test_without_a_package_that_is_needed_nothing_is_measured(bench, monkeypatch, package, options):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    status, out, err = bench(*SMALL, *options)
    assert (status, out) == (2, "")
    assert f"{package} is not installed: pip install" in err


def test_the_default_sizes_fit_the_default_shape(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    args = load_script("bench").parse()
    plan = Plan(args.rounds, args.load_rounds, args.steps, args.contexts, args.prefill, args.rows)
    assert (plan.contexts, plan.prefill, plan.rows) == ((64, 1900), 512, 8)
    assert plan.longest <= LlamaConfig().max_position_embeddings
