"""What a recorded decode step needs of the model; recordings themselves are tested in test_cuda.py."""

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.checkpoints.storage import record_steps
from tinyllama.errors import InputError
from tinyllama.generation import generate, stream
from tinyllama.kernels import KERNELS


@pytest.mark.parametrize("attention", sorted(KERNELS))
def test_a_step_is_one_graph_without_breaks_or_recompilation(attention):
    # Fails on a Python branch over data, on a length that is baked into the graph, and on an .item(), which
    # the compiler takes into the graph without a word: on a GPU every step would wait for it.
    torch._dynamo.reset()
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, ids = tiny_model(attention=attention), some_ids(2, 8)
    step = torch.compile(model, fullgraph=True, backend=collect)
    compiled_cache, cache = model.new_cache(2, 16), model.new_cache(2, 16)
    with torch.no_grad():
        for t in range(8):
            positions = torch.tensor([[t], [t - 3]]).clamp(min=-1)
            compiled = step(ids[:, t : t + 1], compiled_cache, positions)
            torch.testing.assert_close(
                compiled, model(ids[:, t : t + 1], cache, positions), atol=1e-5, rtol=0
            )
    (graph,) = graphs
    assert not [node for node in graph.graph.nodes if node.target in ("item", "tolist")]


def test_generation_takes_its_steps_where_one_is_set():
    model, other, prompts, calls = tiny_model(), tiny_model(), [[5, 7, 11], [3], [2, 9, 4, 1, 8]], []

    def step(ids, cache, positions):
        calls.append(ids)
        return model(ids, cache, positions)

    other.step = step
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        settings |= {"max_new_tokens": 12, "eos_ids": ()}
        assert generate(other, prompts, **settings) == generate(model, prompts, **settings)
        assert list(stream(other, prompts[0], **settings)) == list(stream(model, prompts[0], **settings))
    assert len(calls) == 4 * 11  # the first token of a text comes from its prefill


def test_a_model_on_a_cpu_is_not_recorded():
    with pytest.raises(InputError, match="graph: expected a model on cuda"):
        record_steps(tiny_model())
