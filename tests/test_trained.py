"""Reality: the trained embedded model against transformers, on text, greedily and sampled."""

from __future__ import annotations

import pytest
import torch

import tinyllama
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.continuations import SETTINGS, reference_ids
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.texts import PROMPTS

pytestmark = pytest.mark.usefixtures("no_grad")

TEXT = """A language model gives, for each place in a text, a probability for every token that may come \
next. naïve façade: Ελλάδα, Москва, 東京 🦙 for i in range(10): print(f"{i:>3}")"""


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


@pytest.fixture(scope="module")
def reference(loaded):
    """The model of transformers over the very tensors of `loaded`."""
    return reference_model(loaded[0], "sdpa")


@pytest.fixture(scope="module")
def prompts(loaded):
    return [loaded[1].encode(prompt) for prompt in PROMPTS]


def test_greedy_ids_of_10_prompts_equal_transformers(loaded, reference, prompts):
    model, _ = loaded
    model.set_attention(tinyllama.sdpa)
    ours = tinyllama.generate(model, prompts, max_new_tokens=16, eos_ids=())
    assert ours == reference_ids(reference, prompts, 16)
    # The batch is no privilege: alone, a prompt goes on the same way.
    (alone,) = tinyllama.generate(model, prompts[:1], max_new_tokens=80, eos_ids=())
    assert alone[:16] == ours[0]
    assert alone == greedy_ids(reference, prompts[0], alone)


def test_greedy_ids_of_10_prompts_by_the_fast_layers_equal_transformers(smollm2_folder, reference, prompts):
    model = tinyllama.load_model(smollm2_folder, device="cpu", dtype="float32", weights="stored")
    ours = tinyllama.generate(model, prompts, max_new_tokens=40, eos_ids=())
    for prompt, ids in zip(prompts, ours, strict=True):
        assert ids == greedy_ids(reference, prompt, ids)
    (alone,) = tinyllama.generate(model, prompts[:1], max_new_tokens=200, eos_ids=())
    assert alone[:40] == ours[0]
    assert alone == greedy_ids(reference, prompts[0], alone)


def greedy_ids(reference, prompt, ids):
    """What transformers prefers after each beginning of a text: if it is the text, that is its greedy one."""
    return reference(torch.tensor([prompt + ids])).logits[0].argmax(dim=-1)[len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampled_ids_equal_transformers(loaded, reference, prompts, settings):
    model, tokenizer = loaded
    model.set_attention(tinyllama.sdpa)
    prompt = prompts[2]
    for seed in range(4):  # `make parity` tries twenty, and so does test_generation.py on a small model
        # The second id is the first from the cache; what else a long text brings, one seed shows.
        count = 2 if seed else 12
        (ours,) = tinyllama.generate(model, [prompt], max_new_tokens=count, eos_ids=(), seed=seed, **settings)
        assert [ours] == reference_ids(reference, [prompt], count, seed, **settings), seed
        assert tokenizer.decode(ours)


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
