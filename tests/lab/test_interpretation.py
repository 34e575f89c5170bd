"""The classic questions: exact identities on the fixture; the lab guide asks them of a trained model."""

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


def last_logits(model, ids):
    return model(torch.tensor([ids]))[0, -1]


def test_the_lens_ends_in_the_models_own_logits_and_begins_with_the_embedding():
    model = tiny_model()
    lens = logit_lens(model, IDS)
    assert lens.shape == (5, 9, 320)
    assert torch.equal(lens[-1], model(torch.tensor([IDS]))[0])
    embedding = model.embed_tokens(torch.tensor(IDS))
    assert torch.equal(lens[0], model.lm_head(model.norm(embedding)))


def test_a_layer_that_does_nothing_leaves_the_lens_as_it_was():
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


def test_a_head_s_attribution_is_what_it_wrote():
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
    # Each row of one batch is patched at another place.
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


@pytest.mark.parametrize(("back", "expected"), [(1, (1.0, 0.0)), (5, (0.0, 1.0)), (4, (0.0, 0.0))])
def test_a_head_that_looks_at_the_right_place_scores_one(back, expected):
    # The text has 6 tokens and is repeated: the token after the same token's last occurrence is 5 back.
    pattern = torch.eye(12).roll(-back, dims=1).expand(1, 8, -1, -1)
    model = tiny_model()
    with tinyllama.patch(model, {f"layers.{layer}.self_attn.pattern": pattern for layer in range(4)}):
        scores = head_scores(model, length=6)
    assert (scores.previous == expected[0]).all()
    assert (scores.induction == expected[1]).all()


def test_head_scores_leaves_the_kernels_as_they_were_and_depends_on_the_seed():
    model = tiny_model(attention="sdpa")
    model.set_attention(eager, layers=[1])
    first, again, other = head_scores(model), head_scores(model), head_scores(model, seed=1)
    assert [attention.kernel for attention in model.attentions] == [sdpa, eager, sdpa, sdpa]
    assert torch.equal(first.induction, again.induction)
    assert not torch.equal(first.induction, other.induction)
