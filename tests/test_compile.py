"""torch.compile makes one graph of a decode step, and the graph computes what the model computes."""

import shutil

import pytest
import torch

from tests.shapes import some_ids, tiny_model
from tinyllama.attention import KERNELS


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
def test_a_compiled_pass_equals_an_eager_one():
    # Inductor writes new code for every operation. 1e-5 is the ceiling on float32 relRMS; logits have RMS 1.
    torch._dynamo.reset()
    model, ids = tiny_model(attention="sdpa", num_hidden_layers=1), some_ids(1, 16)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids)
        torch.testing.assert_close(compiled, model(ids), atol=1e-5, rtol=0)
