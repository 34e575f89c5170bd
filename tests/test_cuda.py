"""On a GPU: the same criteria and the same ids. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tests.test_generation import PROMPTS, SETTINGS
from tinyllama.attention import KERNELS
from tinyllama.generation import generate
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.reference import config_fields, reference_model

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


def transformers_ids(model, prompt, count, seed=None, **settings):
    sampling = {"do_sample": False} if seed is None else {"do_sample": True, **settings}
    if seed is not None:
        torch.manual_seed(seed)
    ids = torch.tensor([prompt], device="cuda")
    out = reference_model(model, "sdpa").generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        pad_token_id=0,
        eos_token_id=None,
        **sampling,
    )
    return out[:, len(prompt) :].tolist()


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
