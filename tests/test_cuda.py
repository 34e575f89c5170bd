"""On a GPU: the same criteria and the same ids. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tests.test_generation import PROMPTS
from tinyllama.generation import generate
from tinyllama.kernels import KERNELS
from tinyllama.parity import bisect, difference, judge, kernel_run, oracle_logits, reference_run
from tinyllama.parity.comparison import REFERENCES
from tinyllama.parity.continuations import SETTINGS, reference_ids
from tinyllama.parity.gradients import compare_gradients
from tinyllama.parity.mutations import MUTATIONS
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.trace import our_trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IDS = some_ids(1, 64)


@pytest.fixture(autouse=True)
def _no_tf32():
    # TF32 rounds float32 products to 10 bits.
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("attention", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_pass_the_criteria_of_the_dtype(dtype, attention):
    model = tiny_model(dtype=dtype, attention=attention)
    truth = oracle_logits(config_fields(model.config), model.state_dict(), IDS[0].tolist())
    model = model.cuda()
    with torch.no_grad():
        logits = model(IDS.cuda())
        theirs = [reference_model(model, name)(IDS.cuda()).logits for name in sorted(KERNELS)]
    references = [difference(reference[0].cpu(), truth) for reference in theirs]
    verdict = judge(difference(logits[0].cpu(), truth), references, dtype)
    assert verdict.passed, verdict.failures
    if attention == "eager" and dtype != torch.float64:
        assert torch.equal(logits, theirs[0])


def test_the_right_model_diverges_nowhere_and_a_planted_bug_is_named():
    right = tiny_model().cuda()
    ids, references = IDS[0].tolist(), [reference_run(right, name) for name in REFERENCES]
    assert bisect(kernel_run(right, KERNELS["sdpa"]), right, ids, references) is None
    (mutation,) = (
        mutation for mutation in MUTATIONS if mutation.name == "KV heads tiled instead of repeated"
    )
    wrong = tiny_model().cuda()
    with mutation.planted(wrong):
        found = bisect(lambda ids, at: our_trace(wrong, ids, at), right, ids, references)
    assert (found.address, found.suspect) == (mutation.address, mutation.suspect)


def test_gradients_pass():
    assert all(row.passed for row in compare_gradients(tiny_model().cuda(), IDS[0].tolist()))


def transformers_ids(model, prompt, count, seed=None, **settings):
    return reference_ids(reference_model(model, "sdpa"), [prompt], count, seed, **settings)


@pytest.mark.parametrize("attention", sorted(KERNELS))
def test_greedy_ids_equal_transformers(attention):
    model = tiny_model(attention=attention).cuda()
    for prompt in PROMPTS:
        assert generate(model, [prompt], max_new_tokens=40, eos_ids=()) == transformers_ids(model, prompt, 40)


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampled_ids_equal_transformers_with_the_gpus_own_generator(settings):
    model = tiny_model(attention="sdpa").cuda()
    before = torch.cuda.get_rng_state()
    for seed in range(20):
        torch.cuda.set_rng_state(before)
        ours = generate(model, [PROMPTS[0]], max_new_tokens=12, eos_ids=(), seed=seed, **settings)
        assert torch.equal(before, torch.cuda.get_rng_state())
        assert ours == transformers_ids(model, PROMPTS[0], 12, seed, **settings)


def test_a_decode_step_replays_as_a_cuda_graph():
    # Fails on any copy from the host or wait for the device within a step.
    model = tiny_model(attention="sdpa").cuda()
    cache = model.new_cache(1, 32)
    token, position = torch.tensor([[5]], device="cuda"), torch.tensor([[0]], device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(token, cache, position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = model(token, cache, position)
        expected_cache = model.new_cache(1, 32)
        for t, id in enumerate([5, 7, 11, 13]):
            token.fill_(id)
            position.fill_(t)
            graph.replay()
            expected = model(token, expected_cache, position)
            torch.testing.assert_close(replayed, expected, atol=1e-5, rtol=0)
