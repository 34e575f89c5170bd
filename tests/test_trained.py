"""Reality: the trained embedded model against transformers, on text, greedily and sampled."""

from __future__ import annotations

import pytest
import torch

import tinyllama
from tinyllama.kernels import KERNELS
from tinyllama.parity import difference, judge, oracle_logits
from tinyllama.parity.continuations import SETTINGS, reference_ids
from tinyllama.parity.reference import config_fields, reference_model
from tinyllama.parity.texts import PROMPTS

pytestmark = pytest.mark.usefixtures("no_grad")

TEXT = "naïve façade: Ελλάδα, Москва, 東京 🦙 for i in range(10):"


@pytest.fixture(scope="module")
def loaded(smollm2_folder):
    return tinyllama.load(str(smollm2_folder), device="cpu", dtype="float32", attention="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # `make parity` judges all four
def test_logits_on_text_pass_the_criteria_of_the_dtype(smollm2_folder, loaded, dtype):
    model, tokenizer = loaded
    if dtype != torch.float32:
        model = tinyllama.load_model(smollm2_folder, device="cpu", dtype=dtype)
    ids = tokenizer.encode(TEXT)
    batch = torch.tensor([ids])
    truth = oracle_logits(config_fields(model.config), model.state_dict(), ids)
    references = {name: reference_model(model, name)(batch).logits for name in KERNELS}
    errors = [difference(logits[0], truth) for logits in references.values()]
    for name, kernel in KERNELS.items():
        model.set_attention(kernel)
        logits = model(batch)
        assert judge(difference(logits[0], truth), errors, dtype).failures == ()
        assert torch.equal(logits, references[name]), name


@pytest.fixture(scope="module")
def reference(loaded):
    """The model of transformers over the very tensors of `loaded`."""
    return reference_model(loaded[0], "sdpa")


@pytest.fixture(scope="module")
def prompts(loaded):
    return [loaded[1].encode(prompt) for prompt in PROMPTS[:4]]


@pytest.mark.parametrize("weights", ["exact", "stored"])
def test_greedy_ids_equal_transformers_in_a_batch_and_alone(
    smollm2_folder, loaded, reference, prompts, weights
):
    model, _ = loaded
    model.set_attention(tinyllama.sdpa)
    if weights == "stored":
        model = tinyllama.load_model(smollm2_folder, device="cpu", dtype="float32", weights="stored")
    batch = tinyllama.generate(model, prompts, max_new_tokens=8, eos_ids=())
    (alone,) = tinyllama.generate(model, prompts[:1], max_new_tokens=24, eos_ids=())
    assert alone[:8] == batch[0]
    for prompt, ids in zip([*prompts, prompts[0]], [*batch, alone], strict=True):
        # What transformers prefers after each beginning: if that is the text, the text is its greedy one.
        preferred = reference(torch.tensor([prompt + ids])).logits[0].argmax(dim=-1)
        assert ids == preferred[len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampled_ids_equal_transformers(loaded, reference, prompts, settings):
    model, _ = loaded
    model.set_attention(tinyllama.sdpa)
    prompt = prompts[2]
    # One seed; `make parity` tries twenty, and test_generation.py twenty on a small model.
    ours = tinyllama.generate(model, [prompt], max_new_tokens=5, eos_ids=(), seed=3, **settings)
    assert ours == reference_ids(reference, [prompt], 5, 3, **settings)


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
