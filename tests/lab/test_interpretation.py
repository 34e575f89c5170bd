"""The classic questions: exact identities on the fixture, and what is known of trained models on one."""

import pytest
import torch

import tinyllama
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager, sdpa
from tinyllama.errors import InputError
from tinyllama.lab.interpretation import (
    activation_patching,
    direct_logit_attribution,
    head_scores,
    logit_lens,
)

pytestmark = pytest.mark.usefixtures("no_grad")

IDS = some_ids(1, 9)[0].tolist()
OTHER = some_ids(1, 9, seed=1)[0].tolist()


@pytest.fixture(scope="module")
def trained(smollm2_folder):
    """The embedded model and its tokenizer."""
    return tinyllama.load("smollm2", device="cpu", dtype="float32")


def last_logits(model, ids):
    return model(torch.tensor([ids]))[0, -1]


def test_the_lens_ends_in_the_models_own_logits_and_begins_with_the_embedding():
    model = tiny_model()
    lens = logit_lens(model, IDS)
    assert lens.shape == (5, 9, 320)
    assert torch.equal(lens[-1], model(torch.tensor([IDS]))[0])
    embedding = model.embed_tokens(torch.tensor(IDS))
    assert torch.equal(lens[0], model.lm_head(model.norm(embedding)))


def test_the_lens_sees_a_layer_that_does_nothing():
    model = tiny_model()
    with tinyllama.patch(model, {"layers.2.self_attn": torch.zeros_like, "layers.2.mlp": torch.zeros_like}):
        lens = logit_lens(model, IDS)
    assert torch.equal(lens[2], lens[3])
    assert not torch.equal(lens[1], lens[2])


@pytest.mark.parametrize("against", [None, 17])
def test_attributions_add_up_to_the_logit(against):
    # In float64, so that a part that is left out or taken twice cannot hide in rounding.
    model = tiny_model(dtype=torch.float64)
    logits = last_logits(model, IDS)
    expected = logits[5] - (0 if against is None else logits[against])
    parts = direct_logit_attribution(model, IDS, 5, against)
    assert parts.heads.shape == (4, 8)
    assert parts.mlps.shape == (4,)
    torch.testing.assert_close(parts.total, expected, rtol=1e-12, atol=1e-12)


def test_an_attribution_is_what_the_head_wrote():
    # Everything after the head is held fixed but the sum: so remove its part from the last stream alone.
    model = tiny_model(dtype=torch.float64)
    parts = direct_logit_attribution(model, IDS, 5)
    attention = model.layers[3].self_attn
    with tinyllama.capture(model, "layers.3", "layers.3.self_attn.z", "norm") as values:
        model(torch.tensor([IDS]))
    written = attention.o_proj.weight[:, 6 * 8 : 7 * 8] @ values["layers.3.self_attn.z"][0, 6, -1]
    stream = values["layers.3"][0, -1]
    scale = torch.rsqrt(stream.pow(2).mean() + model.norm.eps)
    expected = model.lm_head.weight[5] @ (model.norm.weight * scale * written)
    torch.testing.assert_close(parts.heads[3, 6], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", ["layers.*", "layers.*.self_attn.z", "embed_tokens"])
def test_patching_all_places_one_by_one_equals_patching_each_alone(pattern):
    # The rows of one batch are patched at different places; a row must get its own and no other.
    model = tiny_model()
    results = activation_patching(model, IDS, OTHER, lambda logits: logits[:, 5] - logits[:, 7], pattern)
    with tinyllama.capture(model, pattern) as clean:
        model(torch.tensor([IDS]))
    for row, (address, value) in enumerate(clean.items()):
        assert results.shape[1] == value.shape[1]
        for place in range(value.shape[1]):

            def put(x, value=value, place=place):
                x = x.clone()
                x[:, place] = value[:, place]
                return x

            with tinyllama.patch(model, {address: put}):
                logits = last_logits(model, OTHER)
            torch.testing.assert_close(results[row, place], logits[5] - logits[7], atol=1e-5, rtol=1e-5)


def test_patching_a_text_into_itself_changes_nothing_and_the_last_stream_changes_all():
    model = tiny_model()
    logits = last_logits(model, OTHER)
    same = activation_patching(model, OTHER, OTHER, lambda x: x[:, 5])
    torch.testing.assert_close(same, logits[5].expand(4, 9), atol=1e-5, rtol=1e-5)
    results = activation_patching(model, IDS, OTHER, lambda x: x[:, 5])
    torch.testing.assert_close(results[-1, -1], last_logits(model, IDS)[5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[-1, :-1], logits[5].expand(8), atol=1e-5, rtol=1e-5)


def test_texts_of_different_lengths_cannot_be_patched():
    with pytest.raises(InputError, match="expected texts of one length, got 9 and 8 tokens"):
        activation_patching(tiny_model(), IDS, OTHER[:-1], lambda x: x[:, 0])


def test_a_head_that_looks_back_one_token_scores_one():
    def previous(q, k, v, context):
        pattern = torch.eye(q.shape[2]).roll(-1, dims=1).tril()
        pattern[0, 0] = 1
        return context.pattern(pattern.expand(1, q.shape[1], -1, -1)) @ v.repeat_interleave(4, dim=1)

    def repeated(q, k, v, context):
        T = q.shape[2]
        pattern = torch.eye(T)
        for i in range(6, T):
            pattern[i] = torch.eye(T)[i - 6 + 1]
        return context.pattern(pattern.expand(1, q.shape[1], -1, -1)) @ v.repeat_interleave(4, dim=1)

    for kernel, expected in ((previous, (1.0, 0.0)), (repeated, (0.0, 1.0))):
        scores = head_scores_under(kernel)
        assert (scores.previous == expected[0]).all()
        assert (scores.induction == expected[1]).all()


def head_scores_under(kernel):
    """head_scores takes the textbook kernel: here that one is `kernel`."""
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr("tinyllama.lab.interpretation.eager", kernel)
        return head_scores(tiny_model(), length=6)


def test_the_kernels_are_as_before_and_the_text_is_of_the_seed():
    model = tiny_model(attention="sdpa")
    model.set_attention(eager, layers=[1])
    first, again, other = head_scores(model), head_scores(model), head_scores(model, seed=1)
    assert [attention.kernel for attention in model.attentions] == [sdpa, eager, sdpa, sdpa]
    assert torch.equal(first.induction, again.induction)
    assert not torch.equal(first.induction, other.induction)


def test_a_trained_model_has_induction_and_previous_token_heads(trained):
    # A wrong offset finds none: the next best place gets under 0.3 there.
    scores = head_scores(trained[0])
    assert scores.induction.max() > 0.8
    assert scores.previous.max() > 0.8
    assert scores.induction.median() < 0.1
    layer = scores.induction.max(dim=1).values.argmax().item()
    earlier = scores.previous[:layer].max()
    assert earlier > 0.8, "an induction head needs a previous-token head in a layer before it"


def test_the_capital_moves_to_the_last_token_within_one_head(trained):
    # The subject's token decides until layer 22, the last token from layer 23: a head there carries it over.
    model, tokenizer = trained
    france, italy = (tokenizer.encode(f"The capital of {land} is") for land in ("France", "Italy"))
    paris, rome = (tokenizer.encode(city)[-1] for city in (" Paris", " Rome"))

    def prefers_paris(logits):
        return logits[:, paris] - logits[:, rome]

    before, after = activation_patching(model, france, italy, prefers_paris, "layers.2[23]")
    assert before[3] > 7
    assert before[4] < -5
    assert after[3] < -5
    assert after[4] > 7
    by_head = activation_patching(model, france, italy, prefers_paris, "layers.2*.self_attn.z")
    assert by_head.flatten().argmax() == 4 * 9 + 4  # layers 2, 20, 21, 22, 23
    direct = direct_logit_attribution(model, france, paris, rome)
    assert direct.heads.flatten().argmax() == 23 * 9 + 4
    torch.testing.assert_close(
        direct.total, prefers_paris(last_logits(model, france)[None])[0], rtol=1e-4, atol=0
    )
