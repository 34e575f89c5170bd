"""Reality: the trained embedded model against transformers, on text, greedily and sampled."""

from __future__ import annotations

import pytest
import torch

import tinyllama
from tests.test_generation import transformers_ids
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.continuations import SETTINGS
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.texts import PROMPTS

pytestmark = pytest.mark.usefixtures("no_grad")

TEXT = """A language model gives, for each place in a text, a probability for every token that may come \
next. Training makes the tokens that did come more likely. für naïve façade: Ελλάδα, Москва, 東京, 서울 🦙🦙 \
for i in range(10): print(f"{i:>3} {i * i:>5}")"""


@pytest.fixture(scope="module")
def loaded(smollm2_folder):
    return tinyllama.load(str(smollm2_folder), device="cpu", dtype="float32", attention="eager")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_on_text_pass_the_criteria_of_the_dtype(smollm2_folder, loaded, dtype):
    _, tokenizer = loaded
    model = tinyllama.load_model(smollm2_folder, device="cpu", dtype=dtype, attention="eager")
    ids = tokenizer.encode(TEXT)
    batch = torch.tensor([ids])
    truth = oracle_logits(config_fields(model.config), model.state_dict(), ids)
    references = []
    for attention in ("eager", "sdpa"):
        reference = reference_model(model, attention)(batch).logits
        references.append(difference(reference[0], truth))
        model.set_attention(getattr(tinyllama, attention))
        logits = model(batch)
        verdict = judge(difference(logits[0], truth), references, dtype)
        assert verdict.passed, (attention, verdict.failures)
        if dtype != torch.float64:  # transformers' norms and RoPE stay float32 there
            assert torch.equal(logits, reference), attention


def test_200_greedy_ids_of_10_prompts_equal_transformers(loaded):
    model, tokenizer = loaded
    model.set_attention(tinyllama.sdpa)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    ours = tinyllama.generate(model, prompts, max_new_tokens=200, eos_ids=())
    assert ours == transformers_ids(model, prompts, 200)
    # The batch is no privilege: alone, a prompt goes on the same way.
    assert tinyllama.generate(model, prompts[:1], max_new_tokens=40, eos_ids=()) == [ours[0][:40]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampled_ids_equal_transformers_for_twenty_seeds(loaded, settings):
    model, tokenizer = loaded
    model.set_attention(tinyllama.sdpa)
    prompt = tokenizer.encode(PROMPTS[2])
    for seed in range(20):
        ours = tinyllama.generate(model, [prompt], max_new_tokens=6, eos_ids=(), seed=seed, **settings)
        assert ours == transformers_ids(model, [prompt], 6, seed, **settings), seed
    assert tokenizer.decode(ours[0])


def test_it_answers_in_a_chat_and_stops_by_itself(loaded):
    model, tokenizer = loaded
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    tokens = tinyllama.stream(model, ids, max_new_tokens=60)
    reply = tinyllama.TextReply(tokens, tokenizer, ids)
    text = "".join(reply)
    assert "Paris" in text
    assert reply.reason == "eos"
    assert "<|im_end|>" not in text
    assert tokenizer.decode(reply.ids, skip_special=True) == text
