"""torch.compile makes one graph of a decode step, and the graph computes what the model computes."""

import shutil

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.fast.graph import CompiledStep
from tinyllama.generation import generate, stream
from tinyllama.kernels import KERNELS


@pytest.mark.parametrize("attention", sorted(KERNELS))
def test_decoding_is_one_graph_without_breaks_or_recompilation(attention):
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


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_steps_equal_eager_ones():
    # Inductor writes new code for every operation. 1e-5 is the ceiling on float32 relRMS; logits have RMS 1.
    torch._dynamo.reset()
    model, ids = tiny_model(attention="sdpa", num_hidden_layers=1), some_ids(2, 6)
    compiled_cache, cache = model.new_cache(2, 8), model.new_cache(2, 8)
    step = CompiledStep(model)
    with torch.inference_mode():
        for t in range(6):
            positions = torch.tensor([[t], [t - 2]]).clamp(min=-1)
            expected = model(ids[:, t : t + 1], cache, positions)
            torch.testing.assert_close(
                step(ids[:, t : t + 1], compiled_cache, positions), expected, atol=1e-5, rtol=0
            )


def test_generation_by_compiled_steps_gives_the_same_ids(monkeypatch):
    # With the graph taken as it is: that the compiler's code is right is the other test's business.
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda step, **how: compile(step, fullgraph=how["fullgraph"], backend="eager")
    )
    model, graph, prompts = (
        tiny_model(attention="sdpa"),
        tiny_model(attention="sdpa"),
        [[5, 7, 11], [3], [2, 9, 4, 1, 8]],
    )
    graph.step = CompiledStep(graph)
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        settings |= {"max_new_tokens": 12, "eos_ids": ()}
        assert generate(graph, prompts, **settings) == generate(model, prompts, **settings)
        assert list(stream(graph, prompts[0], **settings)) == list(stream(model, prompts[0], **settings))
