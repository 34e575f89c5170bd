"""What ranks do in processes of their own; one start serves many comparisons, because it takes longest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import tinyllama
from tests.shapes import some_ids
from tinyllama.bench import measure, on_ranks, torch_peers
from tinyllama.bench.peers import Setup
from tinyllama.bench.results import Run
from tinyllama.checkpoints.load import load_model
from tinyllama.errors import InputError
from tinyllama.fast import threads
from tinyllama.model import Llama
from tinyllama.parallel import ranks as ranks_module
from tinyllama.parallel.plan import Plan
from tinyllama.parallel.ranks import RankError, Ranks

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is", to SmolLM2
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "seed": 7}


def values(model: Llama) -> dict[str, Any]:
    """What a model gives for short and long texts, padded batches and steps from a cache; and the cache."""
    V = model.config.vocab_size
    found: dict[str, Any] = {}
    with torch.no_grad():
        for T in (1, 5, 40):
            found[f"logits of {T}"] = model(some_ids(1, T, V, seed=T))
        cache = model.new_cache(2, 12)
        with tinyllama.capture(
            model, "layers.*", "layers.*.self_attn.*_rot", "lm_head", whole=True
        ) as inside:
            model(some_ids(1, 7, V))
        found |= inside
        prompts = [some_ids(1, n, V, seed=n)[0].tolist() for n in (9, 4)]
        found["prefill of a padded batch"] = tinyllama.prefill(model, prompts, cache)
        own = model.sharing
        first = (0, 0) if own is None else (own.layers.start, own.kv_heads.start)
        found["cache"] = first, cache.keys, cache.values
    prompt = [id % V for id in PROMPT]
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": SAMPLED,
        "guessed": {"speculate": 3, **SAMPLED},
    }
    for name, settings in ways.items():
        found[name] = tinyllama.generate(model, [prompt], max_new_tokens=4, eos_ids=(), **settings)
    found["ragged"] = tinyllama.generate(model, prompts, max_new_tokens=2, eos_ids=(), **SAMPLED)
    return found


def load_and_compare(ranks: Ranks | None, folder: Path, cases: list[dict[str, Any]]) -> list[Any]:
    """The values of one checkpoint, loaded in several ways, on this rank."""
    usual: dict[str, Any] = {"device": "cpu", "dtype": "float32", "ranks": ranks}
    return [values(load_model(folder, **{**usual, **case})) for case in cases]


def digest(tensors: list[torch.Tensor]) -> str:
    """Of all bits."""
    joined = hashlib.sha256()
    for tensor in tensors:
        joined.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return joined.hexdigest()


def refusal(ranks: Ranks, folders: list[Path], versions: list[str], splits: list[str]) -> str:
    """What a rank says of loading its own folder, with its own version of the code and its own split."""
    ranks_module.code_version = lambda: versions[ranks.rank]
    try:
        load_model(folders[ranks.rank], device="cpu", dtype="float32", ranks=ranks, split=splits[ranks.rank])
    except InputError as error:
        return str(error)
    return "loaded"


def late(ranks: Ranks) -> str:
    """What rank 0 says of a rank 1 that does not come."""
    if ranks.rank == 1:
        ranks._store.wait(["gave up"])
        ranks.same("answer", "")  # too late
        return ""
    patience, ranks.limit = ranks.limit, 1.0
    with pytest.raises(RankError) as caught:
        ranks.same("answer", "")
    ranks.limit = patience
    ranks._store.set("gave up", "")
    return str(caught.value)


def interrupted(ranks: Ranks) -> list[Any]:
    """Ctrl-C on rank 0 during a pass counts at the next exchange; what is sent leaves the sender's own be."""
    own = torch.full((2, 2), float(ranks.rank))
    sent = ranks.send(own, 1)
    if ranks.rank == 0:
        ranks._stopped = True
        with pytest.raises(KeyboardInterrupt):
            ranks.share(lambda: "lost")
    return [ranks.share(lambda: "next"), own.tolist(), sent.tolist()]


def traffic(ranks: Ranks, folder: Path) -> list[tuple[int, int]]:
    """Bytes that a rank receives for one token, in each split and in a pipeline: counted, and as planned."""
    found = []
    for split, stages in (("exact", 1), ("fast", 1), ("exact", 2)):
        model = load_model(folder, device="cpu", dtype="float32", ranks=ranks, split=split, pipeline=stages)
        before = ranks.traffic.received
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long))
        planned = Plan.of(model.config, ranks.size, split, stages).received(4, ranks.rank)
        found.append((ranks.traffic.received - before, planned))
    return found


def benched(ranks: Ranks, setup: Setup, names: list[str], plan: measure.Plan) -> dict[str, Any]:
    """What the bench finds, and of each text that this rank decodes: ids, and threads of each pass.

    All threads but one seem late in every pass.
    """
    texts: list[dict[str, list[int]]] = []
    found: dict[str, Any] = {"texts": texts}

    def watched(model: Llama, *arguments: Any, **settings: Any) -> Iterator[int]:
        text: dict[str, list[int]] = {"ids": [], "threads": []}
        texts.append(text)
        hook = model.register_forward_hook(lambda *_: text["threads"].append(torch.get_num_threads()))
        for id in tinyllama.stream(model, *arguments, **settings):
            text["ids"].append(id)
            yield id
        hook.remove()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch_peers, "stream", watched)
        patched.setattr(threads, "team", threads.Team(computed=lambda: 0.0))
        if ranks.rank > 0:
            torch.set_num_threads(setup.threads // setup.ranks_here)
            on_ranks.serve(ranks, None)
            return found
        torch.set_num_threads(setup.threads)
        limits = measure.Limits("cpu", read_bytes=1_000_000, product=(8, 16, 16))
        run = Run("", {}, "", 0, "cpu", "float32", 0)
        with on_ranks.directing(ranks, setup):
            found |= asdict(measure.measure_speeds(run, names, setup, plan, limits, ranks))
        return found | {"threads": torch.get_num_threads()}
