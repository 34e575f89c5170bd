"""On a GPU: the same criteria and the same ids. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tests.test_generation import PROMPTS
from tinyllama.checkpoints.storage import record_steps
from tinyllama.errors import InputError
from tinyllama.fast.graph import RecordedStep
from tinyllama.generation import generate, stream
from tinyllama.kernels import KERNELS
from tinyllama.model import Llama
from tinyllama.parity import bisect, difference, judge, kernel_run, oracle_logits, reference_run
from tinyllama.parity.comparison import REFERENCES
from tinyllama.parity.continuations import SETTINGS, reference_ids
from tinyllama.parity.gradients import compare_gradients
from tinyllama.parity.mutations import MUTATIONS
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.subjects import QUICK, Shape
from tinyllama.parity.suite import Suite
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


def test_recorded_steps_have_the_bits_of_the_steps_they_record():
    # Fails on any copy from the host or wait for the device within a step.
    model = tiny_model(attention="sdpa").cuda()
    cache, expected_cache = model.new_cache(2, 32), model.new_cache(2, 32)
    step = RecordedStep(model)
    with torch.inference_mode():
        for t, ids in enumerate(some_ids(5, 2).cuda()):
            positions = torch.tensor([[t], [t - 2]], device="cuda").clamp(min=-1)
            expected = model(ids[:, None], expected_cache, positions)
            assert torch.equal(step(ids[:, None], cache, positions), expected)


def test_a_generation_from_a_recording_has_the_same_ids_and_honours_changes_before_it():
    model, recorded = (tiny_model(attention="sdpa").cuda() for _ in range(2))
    record_steps(recorded)
    for attention in ("sdpa", "eager"):
        for each in (model, recorded):
            each.set_attention(KERNELS[attention])
        assert generate(recorded, PROMPTS, max_new_tokens=30) == generate(model, PROMPTS, max_new_tokens=30)
    calls = []
    recorded.norm.register_forward_hook(lambda *_: calls.append(1))
    cache = recorded.new_cache(1, 64)
    for _ in range(2):  # the same cache again
        cache.length = 0
        list(stream(recorded, PROMPTS[0], max_new_tokens=20, eos_ids=(), cache=cache))
    assert len(calls) == 2 * 3  # prefill, one step as usual, and its recording


def test_a_step_that_waits_for_the_gpu_is_not_recorded_and_the_model_goes_on():
    def waiting(q, k, v, context):
        return KERNELS["eager"](q, k, v, context) * (1.0 if q.sum().item() else 2.0)

    model = tiny_model().cuda()
    model.set_attention(waiting)
    expected = generate(model, [PROMPTS[0]], max_new_tokens=8)
    record_steps(model)
    with pytest.raises(InputError, match="graph: the decode step cannot be recorded"):
        generate(model, [PROMPTS[0]], max_new_tokens=8)
    model.step = None
    assert generate(model, [PROMPTS[0]], max_new_tokens=8) == expected


def test_a_model_follows_every_way_to_a_device_or_dtype():
    expected = tiny_model(dtype=torch.float64)(IDS)
    moved = tiny_model().cuda().double()  # by dtype alone, once it is there
    torch.testing.assert_close(moved(IDS.cuda()).cpu(), expected, atol=1e-10, rtol=0)
    with torch.device("cuda"):
        made = Llama(moved.config).double()
    made.load_state_dict(moved.state_dict())
    torch.testing.assert_close(made(IDS.cuda()).cpu(), expected, atol=1e-10, rtol=0)


def test_the_suite_passes():
    class Tiny(Shape):
        def texts(self, extent):
            return {"text": IDS[0].tolist()}

    suite = Suite()
    suite.judge(Tiny("tiny", tiny_model().config, "cuda"), KERNELS, QUICK)
    assert suite.report.passed
    assert suite.report.cases
