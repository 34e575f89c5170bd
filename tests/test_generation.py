"""Generation: the ids of transformers, however the work is cut up, and every rule for stopping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tests.text.tiny_tokenizers import sentencepiece_folder
from tinyllama.errors import InputError
from tinyllama.generation import generate, prefill, stream
from tinyllama.parity.continuations import SETTINGS, reference_ids
from tinyllama.parity.reference import reference_model
from tinyllama.sampler import NonFiniteLogitsError, Sampler
from tinyllama.text.reply import TextReply
from tinyllama.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [some_ids(1, length, seed=length)[0].tolist() for length in (7, 1, 19, 12)]


def transformers_ids(model, prompts, count, seed=None, **settings):
    """New ids by transformers' generate; its repetition penalty sees the padding too."""
    return reference_ids(reference_model(model, "sdpa"), prompts, count, seed, **settings)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_ids_equal_transformers_alone_and_in_a_batch(attention):
    model = tiny_model(attention=attention)
    together = generate(model, PROMPTS, max_new_tokens=40, eos_ids=())
    assert together == transformers_ids(model, PROMPTS, 40)
    assert together == [generate(model, [prompt], max_new_tokens=40, eos_ids=())[0] for prompt in PROMPTS]


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampled_ids_equal_transformers_for_twenty_seeds(settings):
    model = tiny_model(attention="sdpa")
    for seed in range(20):
        ours = generate(model, [PROMPTS[0]], max_new_tokens=12, eos_ids=(), seed=seed, **settings)
        assert ours == transformers_ids(model, [PROMPTS[0]], 12, seed, **settings), seed


def test_a_seed_gives_the_same_ids_in_another_process():
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7, "eos_ids": ()}
    code = (
        "from tests.shapes import tiny_model; from tinyllama import generate\n"
        f"print(generate(tiny_model(), {PROMPTS!r}, **{settings!r}))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert there.stdout.strip() == str(generate(tiny_model(), PROMPTS, **settings))


def test_a_sampled_batch_equals_transformers_with_one_draw_for_all_rows():
    model = tiny_model(attention="sdpa")
    for seed in range(5):
        ours = generate(model, PROMPTS, max_new_tokens=12, eos_ids=(), seed=seed, **SETTINGS[0])
        assert ours == transformers_ids(model, PROMPTS, 12, seed, **SETTINGS[0])


def test_the_stream_gives_what_generate_gives():
    model = tiny_model()
    settings = {"max_new_tokens": 20, "temperature": 0.9, "seed": 3, "eos_ids": ()}
    tokens = stream(model, PROMPTS[2], **settings)
    assert [list(tokens)] == generate(model, [PROMPTS[2]], **settings)
    assert tokens.reason == "length"


def test_a_stream_can_be_broken_off_and_leaves_gradients_and_rng_alone():
    model = tiny_model()
    before = torch.random.get_rng_state()
    tokens = stream(model, PROMPTS[0], temperature=1.0, seed=0, eos_ids=())
    first = [next(tokens), next(tokens)]
    # A generator that runs under no_grad must not leave it switched on between two tokens.
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert tokens.reason is None
    assert [first] == generate(model, [PROMPTS[0]], max_new_tokens=2, temperature=1.0, seed=0, eos_ids=())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_prefill_gives_the_same_next_token_logits(chunk):
    model = tiny_model()
    whole, cut = model.new_cache(4, 40), model.new_cache(4, 40)
    expected = prefill(model, PROMPTS, whole, chunk=512)
    # 1e-5 is the ceiling on float32 relRMS; these logits have an RMS of about 1.
    torch.testing.assert_close(prefill(model, PROMPTS, cut, chunk=chunk), expected, atol=1e-5, rtol=0)
    alone = [prefill(model, [prompt], model.new_cache(1, 40)) for prompt in PROMPTS]
    torch.testing.assert_close(torch.cat(alone), expected, atol=1e-5, rtol=0)


def test_padding_is_at_position_minus_1_where_it_can_overwrite_nothing():
    model, seen = tiny_model(), []
    hook = model.rotary.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    prefill(model, [[1, 2, 3], [4]], model.new_cache(2, 3))
    hook.remove()
    assert [positions.tolist() for positions in seen] == [[[0, 1, 2], [-1, -1, 0]]]


def test_nothing_is_recorded_for_gradients_while_generating():
    # Else every step would keep its activations alive.
    model, outputs = tiny_model(), []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: outputs.append(output))
    generate(model, [PROMPTS[0]], max_new_tokens=3, eos_ids=())
    hook.remove()
    assert len(outputs) == 3
    assert all(output.is_inference() for output in outputs)


def test_a_cache_that_holds_the_start_needs_only_the_rest():
    model, prompt = tiny_model(), PROMPTS[2]
    expected = generate(model, [prompt], max_new_tokens=10, eos_ids=())[0]
    cache = model.new_cache(1, 256)
    prefill(model, [[*prompt[:11], 5, 6, 7]], cache)
    cache.length = 11
    seen = []
    hook = model.embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1])
    )
    got = list(stream(model, prompt, max_new_tokens=10, eos_ids=(), cache=cache))
    hook.remove()
    assert got == expected
    assert seen[0] == len(prompt) - 11


def test_a_cache_larger_than_the_memory_is_refused_beforehand():
    with pytest.raises(InputError, match=r"memory: the KV cache needs .* GB, cpu has .* GB free"):
        tiny_model().new_cache(10**9, 1000)


def test_a_cache_without_room_is_refused_not_overrun():
    model = tiny_model()
    with pytest.raises(InputError, match="cache: expected room for 17 tokens, got 16"):
        stream(model, PROMPTS[0], max_new_tokens=10, cache=model.new_cache(1, 16))
    full = model.new_cache(1, 17)
    full.length = 7
    with pytest.raises(InputError, match=r"cache\.length: expected less than .* 7 ids, got 7"):
        stream(model, PROMPTS[0], max_new_tokens=10, cache=full)


def test_eos_ends_a_row_and_is_part_of_it():
    model = tiny_model()
    free = generate(model, PROMPTS, max_new_tokens=30, eos_ids=())
    end = free[0][4]
    ended = generate(model, PROMPTS, max_new_tokens=30, eos_ids=[end])
    for row, full in zip(ended, free, strict=True):
        cut = full.index(end) + 1 if end in full else 30
        assert row == full[:cut]
    tokens = stream(model, PROMPTS[0], max_new_tokens=30, eos_ids=[end])
    assert list(tokens) == ended[0]
    assert tokens.reason == "eos"


def test_the_checkpoints_eos_ids_are_the_default():
    model = tiny_model(eos_token_id=None)
    free = generate(model, [PROMPTS[0]], max_new_tokens=10)[0]
    model = tiny_model(eos_token_id=[319, free[3]])
    assert generate(model, [PROMPTS[0]], max_new_tokens=10)[0] == free[: free.index(free[3]) + 1]


def test_a_full_context_ends_each_row_at_its_own_length():
    model = tiny_model(max_position_embeddings=24)
    rows = generate(model, PROMPTS, max_new_tokens=100, eos_ids=())
    assert [len(prompt) + len(row) for prompt, row in zip(PROMPTS, rows, strict=True)] == [24] * 4
    assert rows == [generate(model, [prompt], max_new_tokens=100, eos_ids=())[0] for prompt in PROMPTS]
    tokens = stream(model, PROMPTS[0], max_new_tokens=100, eos_ids=())
    assert len(list(tokens)) == 17
    assert tokens.reason == "length"


def test_no_new_tokens_is_an_empty_text():
    assert generate(tiny_model(), PROMPTS, max_new_tokens=0) == [[]] * 4
    tokens = stream(tiny_model(), PROMPTS[0], max_new_tokens=0)
    assert list(tokens) == []
    assert tokens.reason == "length"
    assert generate(tiny_model(), []) == []


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([1] * 256, 1, "256 tokens do not fit the context of 256"),
        ([1] * 300, 1, "300 tokens do not fit the context of 256"),
        ([], 1, "expected at least one id"),
        ([1, 320], 1, "expected ids from 0 to 319, got 1 to 320"),
        ([-1], 1, "expected ids from 0 to 319"),
        ([1], -1, "max_new_tokens: expected 0 or more, got -1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_at_once(prompt, count, message):
    with pytest.raises(InputError, match=message):
        stream(tiny_model(), prompt, max_new_tokens=count)
    with pytest.raises(InputError, match=message):
        generate(tiny_model(), [[1], prompt], max_new_tokens=count)


def test_nan_stops_the_stream_after_the_tokens_so_far():
    model = tiny_model()
    tokens = stream(model, PROMPTS[0], max_new_tokens=10, eos_ids=())
    got = [next(tokens), next(tokens)]
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError):
        next(tokens)
    assert len(got) == 2


class Letters:
    """A tokenizer whose ids are characters."""

    def stream(self, context):
        return self

    def feed(self, token):
        return chr(token)

    def flush(self):
        return ""


def reply_to(text, stop, eos=False):
    class Tokens:
        reason = None

        def __init__(self):
            self.left = iter(text)

        def __iter__(self):
            return self

        def __next__(self):
            try:
                return ord(next(self.left))
            except StopIteration:
                self.reason = "eos"
                raise

    return TextReply(Tokens(), Letters(), [], stop)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("one two three", ["two"], "one ", "stop"),
        ("one two three", ["three", "wo"], "one t", "stop"),
        ("aab", ["ab"], "a", "stop"),
        ("ababac", ["abac"], "ab", "stop"),
        ("almost sto", ["stop"], "almost sto", "eos"),
        ("plain", [], "plain", "eos"),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(text, stop, expected, reason):
    reply = reply_to(text, stop)
    pieces = list(reply)
    assert "".join(pieces) == expected
    assert all(pieces)
    assert reply.reason == reason


def test_text_comes_as_soon_as_it_cannot_start_a_stop_string():
    reply = reply_to("xsty", ["sto"])
    assert next(reply) == "x"
    assert next(reply) == "sty"


def test_an_id_that_the_tokenizer_does_not_have_is_no_text_and_ends_nothing(tmp_path):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path))
    model = tiny_model(vocab_size=tokenizer.vocab_size + 8)
    ids = tokenizer.encode("the cat")
    with torch.no_grad():
        model.lm_head.weight[: tokenizer.vocab_size] = 0
        model.lm_head.weight[tokenizer.vocab_size :] *= 100
    reply = TextReply(stream(model, ids, max_new_tokens=5), tokenizer, ids)
    assert "".join(reply) == ""
    assert (len(reply.ids), reply.reason) == (5, "length")
    assert reply.unknown == reply.ids


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop"):
        reply_to("text", [""])


def test_greedy_is_what_the_most_likely_token_of_each_step_says():
    # The slow oracle of the cache: every step again over the whole text.
    model = tiny_model()
    text = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(10):
            text.append(Sampler().choose(model(torch.tensor([text]))[:, -1], torch.Generator()).item())
    assert generate(model, [PROMPTS[0]], max_new_tokens=10, eos_ids=()) == [text[7:]]
