"""The exact split: every bit is that of one process with as many threads as a rank has, here one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.checkpoints.folders import HEAD, write
from tests.fast.compiled import compiled
from tests.marks import slow
from tests.parallel.jobs import digest, load_and_compare, values
from tests.parallel.together import in_processes, in_threads
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager, sdpa
from tinyllama.lab import smaller_caches, variants
from tinyllama.model import Llama

pytestmark = pytest.mark.usefixtures("one_thread")

# Sizes of which eight ranks have 32 rows each, at least.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}


def assert_same(one: dict[str, Any], ranks: list[dict[str, Any]], tolerance: float = 0.0) -> None:
    """Every rank has what one process has; of the cache, its own heads."""
    for rank, found in enumerate(ranks):
        assert found.keys() == one.keys()
        for name, value in one.items():
            if name == "cache":
                (layer, head), keys, _ = found[name]
                layers, heads = slice(layer, layer + len(keys)), slice(head, head + keys.shape[2])
                for mine, whole in zip(found[name][1:], value[1:], strict=True):
                    assert torch.equal(mine, whole[layers, :, heads]), (rank, name)
            elif isinstance(value, torch.Tensor):
                assert torch.equal(found[name], value), (rank, name)
            else:
                assert found[name] == value, (rank, name)


def model_with(kernel: Any = eager, **changes: Any) -> Llama:
    model = tiny_model(**{**WIDE, "num_hidden_layers": 2, **changes})
    model.set_attention(kernel)
    return model


@pytest.mark.parametrize("kernel", [eager, sdpa])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_any_pipeline(stages, kernel):
    model = model_with(kernel, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=4)
    with torch.no_grad():
        one = values(model)
    assert_same(one, in_threads(model, 2 * stages, values, stages=stages))


@pytest.mark.parametrize("kernel", [eager, sdpa])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(8, 4, 2), (9, 3, 2), (9, 3, 3), (8, 4, 3), (8, 2, 8), (6, 1, 2), (6, 6, 4), (6, 2, 5)],
)
def test_any_head_counts_on_any_number_of_ranks(heads, kv_heads, size, kernel):
    model = model_with(kernel, num_attention_heads=heads, num_key_value_heads=kv_heads)
    with torch.no_grad():
        one = values(model)
    assert_same(one, in_threads(model, size, values))


@settings(max_examples=12)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 8), st.integers(0, 40), st.booleans())
@example(3, 3, 2, 1, True)
def test_random_sizes(K, G, size, odd, tied):
    model = model_with(
        num_attention_heads=K * G,
        num_key_value_heads=K,
        hidden_size=256 + odd,
        intermediate_size=512 + 3 * odd,
        vocab_size=256 + 7 * odd,
        num_hidden_layers=1,
        tie_word_embeddings=tied,
    )
    ids = some_ids(2, 9, 256)
    with torch.no_grad():
        one = model(ids)
    for logits in in_threads(model, size, lambda part: part(ids)):
        assert torch.equal(logits, one)


@pytest.mark.parametrize("name", ["alibi", "window", "differential", "topk"])
def test_a_kernel_is_told_which_heads_it_has(name):
    model = model_with(num_attention_heads=6, num_key_value_heads=3)
    model.set_attention(getattr(variants, name), layers=[0])
    model.set_attention(variants.alibi, layers=[1], heads=[1, 4])  # of all heads, whoever has them
    with torch.no_grad():
        one = values(model)
    assert_same(one, in_threads(model, 2, values))


def test_a_kernel_that_mixes_groups_is_refused():
    model = model_with(smaller_caches.regroup)
    with pytest.raises(Exception, match="run it in one process"):
        in_threads(model, 2, values)


# Processes


@pytest.mark.parametrize("stages", [pytest.param(1, marks=slow), 2])
def test_eight_processes_with_four_layers_of_two_kv_heads(stages, tmp_path):
    model = tiny_model(**WIDE)
    folder = write(
        tmp_path / "model",
        {n if n == HEAD else f"model.{n}": t.detach().contiguous() for n, t in model.state_dict().items()},
        **{**WIDE, "vocab_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8},
    )
    (one,) = load_and_compare(None, folder, [{"attention": "eager"}])
    ways = [{"attention": "eager", "pipeline": stages}]
    ranks = [found[0] for found in in_processes(8, tmp_path / "ranks", load_and_compare, folder, ways)]
    assert_same(one, ranks)


TRAINED: dict[int, list[dict[str, Any]]] = {
    2: [{"attention": "eager"}, {"attention": "sdpa", "weights": "stored"}],
    3: [{"attention": "sdpa", "weights": "int8", "dtype": "bfloat16"}],
}


@slow
@compiled
@pytest.mark.parametrize("size", TRAINED)
def test_the_trained_model(size, tmp_path, smollm2_folder):
    ones = load_and_compare(None, smollm2_folder, TRAINED[size])
    found = in_processes(size, tmp_path / "ranks", load_and_compare, smollm2_folder, TRAINED[size])
    for case, one in enumerate(ones):
        assert_same(one, [results[case] for results in found])
    hashes = {
        digest([value for value in results[0].values() if isinstance(value, torch.Tensor)])
        for results in found
    }
    assert len(hashes) == 1
