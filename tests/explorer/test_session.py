"""What the page is told and may do: views equal the model's values, forks equal patch and kernels."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
import torch

import tinyllama
from tests.scripts.test_scripts import write_checkpoint
from tests.shapes import tiny_model
from tinyllama.attention import eager
from tinyllama.explorer.page import answers, page
from tinyllama.explorer.session import MOST_FORKS, Session
from tinyllama.generation import generate
from tinyllama.lab import direct_logit_attribution, logit_lens
from tinyllama.lab.kernel_file import BUILT_IN
from tinyllama.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("no_grad")
TEXT = "a b ab a b a"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of the small checkpoint that the scripts are tested with."""
    return Tokenizer.from_folder(write_checkpoint(tmp_path_factory.mktemp("explorer")))


@pytest.fixture
def session(tokenizer: Tokenizer) -> Session:
    """A text read by a tiny model."""
    return Session(tiny_model(), tokenizer, tokenizer.encode(TEXT), "tiny", BUILT_IN)


def logits(model, ids):
    return model(torch.tensor([ids]))[0]


def test_views_are_what_the_lab_computes(session):
    model, recording = session.model, session.branches[0].recording
    ids, last = recording.ids, len(recording.ids) - 1
    for token in (0, 3, last):
        lens = session.view("lens", {"token": token})
        p = logit_lens(model, ids)[:, token].float().softmax(-1)
        for row, stage in ((0, "embedding"), (1, "0 mlp"), (4, "3 mlp")):
            (shown,) = (one for one in lens if one["stage"] == stage)
            best = p[row].topk(5)
            assert [word[0] for word in shown["words"]] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor([word[2] for word in shown["words"]]), best.values)
    parts = session.view("attribution", {"token": last, "target": 7})
    expected = direct_logit_attribution(model, ids, 7)
    torch.testing.assert_close(torch.tensor(parts["heads"]), expected.heads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(parts["mlps"]), expected.mlps, atol=1e-5, rtol=1e-4)
    assert abs(parts["rest"]) < 1e-4
    model.set_attention(eager)
    with tinyllama.capture(model, "layers.2.self_attn.scores", "layers.2.self_attn.pattern") as seen:
        logits(model, ids)
    rope = session.view("rope", {"layer": 2, "head": 5, "token": last, "key": 2})
    assert abs(rope["score"] - seen["layers.2.self_attn.scores"][0, 5, last, 2].item()) < 1e-5
    assert abs(rope["by_distance"][last - 2] - rope["score"]) < 1e-9
    assert abs(sum(rope["adds"]) - rope["score"]) < 1e-9
    row = session.view("row", {"layer": 2, "head": 5, "token": last})
    assert row == seen["layers.2.self_attn.pattern"][0, 5, last].tolist()
    whole = session.view("map", {"layer": 2, "head": 5})
    drawn = torch.frombuffer(bytearray(base64.b64decode(whole["data"])), dtype=torch.uint8)
    pattern = seen["layers.2.self_attn.pattern"][0, 5]
    assert (drawn.view(len(ids), -1) / 255 - pattern).abs().max() <= 0.5 / 255 + 1e-6


def test_every_value_of_the_code_can_be_had_and_its_figures_are_right(session):
    recording = session.branches[0].recording
    trace = session.trace(recording, 1, 0)
    place = {"layer": 1, "token": 0}
    shown = [value for step in session.view("code", place)["steps"] for value in step["values"]]
    assert len(shown) > 40
    for value in shown:
        part, index, name = value["key"].split("/", 2)
        steps = recording.passes[0].code.steps if part == "top" else trace.steps
        exact = steps[int(index)].values[name].double()
        answer = session.view("value", {**place, "key": value["key"]})
        assert value["shape"] == answer["shape"] == list(exact.shape)
        assert len(value["axes"]) == exact.dim()
        figures = exact.mean(), exact.min(), exact.max(), exact.square().mean().sqrt()
        got = [answer[name] for name in ("mean", "min", "max", "rms")]
        assert got[1:3] == [one.item() for one in figures[1:3]]
        assert got == pytest.approx([one.item() for one in figures], rel=1e-9, abs=1e-12)
    for key in ("layer/0/nothing", "layer/999/x", "x", "", "top/-1/x", "layer/x/y"):
        with pytest.raises(tinyllama.InputError, match="no such value"):
            session.view("value", {"layer": 1, "token": 0, "key": key})


@pytest.mark.parametrize("other", ["b", "a a a a a a a a a a a b b a"])
def test_a_batch_is_drawn_as_generate_reads_it(session, other):
    ids, others = session.branches[0].recording.ids, session.tokenizer.encode(other)
    answer = session.view("batch", {"text": other})
    longest = max(len(ids), len(others))
    for row, own in zip(answer["rows"], (ids, others), strict=True):
        padding = longest - len(own)
        assert row["positions"] == [-1] * padding + list(range(len(own)))
        assert row["written"] == [padding > 0] + [True] * len(own) + [False] * padding
        assert row["visible"] == [True] * len(own) + [False] * padding
        (alone,) = generate(session.model, [own], max_new_tokens=1, eos_ids=())
        assert row["next"][0] == alone[0]
    assert answer["apart"] < 1e-4


def forked(session, **body):
    number = session.act("fork", {"branch": 0, **body})["branch"]
    return session.branches[number]


def test_forks_are_patch_and_set_attention_exactly(session):
    model, ids = session.model, session.branches[0].recording.ids
    model.set_attention(eager)

    def patched(replacements):
        with tinyllama.patch(model, replacements):
            return logits(model, ids)[-1]

    def zero_heads(z):
        return z.index_fill(1, torch.tensor([1, 4]), 0)

    at = "layers.2"
    cases = [
        ({"kind": "heads", "layer": 2, "heads": [1, 4]}, {f"{at}.self_attn.z": zero_heads}),
        ({"kind": "attention", "layer": 2}, {f"{at}.self_attn": torch.zeros_like}),
        ({"kind": "mlp", "layer": 2}, {f"{at}.mlp": torch.zeros_like}),
        ({"kind": "layer", "layer": 2}, {f"{at}.self_attn": torch.zeros_like, f"{at}.mlp": torch.zeros_like}),
    ]
    for body, replacements in cases:
        assert torch.equal(forked(session, **body).recording.passes[-1].logits, patched(replacements))
    other = forked(session, kind="kernel", kernel="ablate", layer=1, heads=[3])
    model.set_attention(BUILT_IN["ablate"], layers=[1], heads=[3])
    assert torch.equal(other.recording.passes[-1].logits, logits(model, ids)[-1])
    model.set_attention(eager)
    source = session.tokenizer.encode("b b")
    with tinyllama.capture(model, "layers.1") as seen:
        logits(model, source)
    value = seen["layers.1"][0, -1]
    other = forked(session, kind="patch", layer=1, token=2, text="b b")
    put = {"layers.1": lambda x: x.index_copy(1, torch.tensor([2]), value[None, None])}
    assert torch.equal(other.recording.passes[-1].logits, patched(put))
    for part, place, index in (
        ("attention", "self_attn", 0),
        ("mlp", "mlp", 0),
        ("head", "self_attn.z", (0, 5)),
    ):
        address = f"layers.1.{place}"
        with tinyllama.capture(model, address) as seen:
            logits(model, source)
        expected = seen[address][index][1]

        def put_in(x, expected=expected, index=index):
            x = x.clone()
            x[index][3] = expected
            return x

        body = {"layer": 1, "token": 3, "text": "b b", "part": part, "from": 1, "heads": [5]}
        other = forked(session, kind="patch", **body)
        assert torch.equal(other.recording.passes[-1].logits, patched({address: put_in}))
    # The code and the patterns of a fork are those with the change.
    trace = session.trace(session.branches[1].recording, 2, 0)
    assert all(step.values["z"][0, 1].abs().max() == 0 for step in trace.steps if "o_proj" in step.values)


def test_the_python_of_a_fork_gives_its_logits(session):
    model, ids = session.model, session.branches[0].recording.ids
    for body in (
        {"kind": "heads", "layer": 2, "heads": [1, 4]},
        {"kind": "layer", "layer": 0},
        {"kind": "kernel", "kernel": "window", "layer": 1, "heads": None},
        {"kind": "kernel", "kernel": "ablate", "layer": 1, "heads": [2]},
        {"kind": "patch", "layer": 1, "token": 2, "text": "b'b"},
        {"kind": "patch", "layer": 1, "token": 2, "text": "b b", "part": "head", "heads": [3], "from": 0},
        {"kind": "patch", "layer": 1, "token": 2, "text": "b b", "part": "mlp", "from": 1},
        {"kind": "token", "token": 3, "id": 9},
    ):
        model.set_attention(eager)
        branch = forked(session, **body)
        names = {"model": model, "ids": list(ids), "torch": torch, "tinyllama": tinyllama}
        exec(branch.python, names)
        torch.testing.assert_close(names["logits"][0, -1], branch.recording.passes[-1].logits)


def test_a_forced_token_shares_the_prefix_and_equals_a_run_without_a_cache(session):
    for _ in range(4):
        session.act("step", {"branch": 0})
    recording = session.branches[0].recording
    branch = forked(session, kind="token", token=len(recording.ids) - 3, id=11)
    other = branch.recording
    assert other.passes[0] is recording.passes[0]
    assert other.ids == [*recording.ids[:-2], 11]
    torch.testing.assert_close(other.passes[-1].logits, logits(session.model, other.ids)[-1])
    before = recording.passes[-1].logits.clone()
    session.act("step", {"branch": session.branches.index(branch)})
    torch.testing.assert_close(other.passes[-1].logits, logits(session.model, other.ids)[-1])
    assert torch.equal(recording.passes[-1].logits, before)
    # A fork of a fork with a change goes on with the change.
    changed = forked(session, kind="mlp", layer=1)
    number = session.branches.index(changed)
    session.act("step", {"branch": number})
    with tinyllama.patch(session.model, {"layers.1.mlp": torch.zeros_like}):
        expected = logits(session.model, changed.recording.ids)[-1]
    torch.testing.assert_close(changed.recording.passes[-1].logits, expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "seed": 3},
     {"temperature": 0.7, "repetition_penalty": 1.4, "seed": 0}, {"repetition_penalty": 1.3}],
)  # fmt: skip
def test_the_tokens_that_it_chooses_are_those_of_generate(session, settings):
    prompt = list(session.branches[0].recording.ids)
    for _ in range(8):
        session.act("step", {"branch": 0, **{name: str(value) for name, value in settings.items()}})
    expected = generate(session.model, [prompt], max_new_tokens=8, eos_ids=[], **settings)[0]
    assert session.branches[0].recording.ids[len(prompt) :] == expected


def test_two_branches_are_compared(session):
    forked(session, kind="mlp", layer=1)
    answer = session.view("compare", {"branch": 1, "parent": 0})
    first, second = (branch.recording.passes[-1].logits for branch in session.branches)
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    assert answer["common"] == len(session.branches[0].recording.ids)
    assert abs(answer["kl"][-1] - (p.exp() * (p - q)).sum().item()) < 1e-6
    assert answer["stream"][0] == answer["stream"][1] == 0
    assert answer["stream"][2] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("view", "nothing", {}), "no such view"),
        (("view", "map", {"layer": "4", "head": "0"}), "layer: expected 0 to 3, got '4'"),
        (("view", "map", {"layer": "x", "head": "0"}), "layer: expected"),
        (("view", "map", {"layer": "0", "head": ["0"]}), "head: expected"),
        (("view", "row", {"layer": "0", "head": "0", "token": "99"}), "token: expected"),
        (("view", "heads", {"branch": "7"}), "branch: expected 0 to 0"),
        (("view", "choice", {"token": "0", "top_p": "7"}), "top_p: expected"),
        (("view", "choice", {"token": "0", "temperature": "x"}), "settings: "),
        (("act", "nothing", {}), "no such action"),
        (("act", "text", {"text": 7}), "text: expected a text"),
        (("act", "text", {"text": "a " * 900}), "900 tokens|90[0-9] tokens, the context of the model 256"),
        (("act", "fork", {"kind": "x", "layer": 0}), "part: expected"),
        (("act", "fork", {"kind": "heads", "layer": 0, "heads": [8]}), "heads: expected 0 to 7"),
        (
            ("act", "fork", {"kind": "patch", "layer": 0, "token": 0, "text": "a", "part": "x"}),
            "part: expected",
        ),
        (
            ("act", "fork", {"kind": "patch", "layer": 0, "token": 0, "text": "a", "from": 9}),
            "from: expected",
        ),
        (("view", "batch", {"text": None}), "text: expected"),
        (("act", "fork", {"kind": "heads", "layer": 0, "heads": [True]}), "heads: expected 0 to 7"),
        (
            ("act", "fork", {"kind": "kernel", "layer": 0, "kernel": "/etc/passwd:x"}),
            "kernel: expected one of",
        ),
        (("act", "fork", {"kind": "token", "token": 0, "id": 10**9}), "id: expected"),
        (("act", "forget", {"branch": 0}), "the original stays"),
        (("act", "step", {"id": -1}), "id: expected"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(session, call, message):
    what, name, body = call
    before = session.view("state", {})
    with pytest.raises(tinyllama.InputError, match=message):
        getattr(session, what)(name, body)
    assert session.view("state", {}) == before


def test_forks_are_limited_and_can_be_forgotten(session):
    for _ in range(MOST_FORKS):
        forked(session, kind="mlp", layer=1)
    with pytest.raises(tinyllama.InputError, match="forget one"):
        forked(session, kind="mlp", layer=1)
    session.act("forget", {"branch": 3})
    assert len(session.branches) == MOST_FORKS
    number = session.act("fork", {"branch": 2, "kind": "token", "token": 0, "id": 4})["branch"]
    with pytest.raises(tinyllama.InputError, match="forked from it"):
        session.act("forget", {"branch": 2})
    session.act("forget", {"branch": 1})
    assert session.branches[number - 1].parent == 1


def test_a_saved_page_holds_the_answers_and_escapes_everything(session, tmp_path: Path):
    session.act("text", {"text": "</script><script>alert(1)</script>"})
    forked(session, kind="mlp", layer=1)
    saved = answers(session, 2, 0)
    text = page(saved)
    assert "alert(1)" not in text
    (data,) = re.findall(r'id="saved">([A-Za-z0-9+/=]*)</script>', text)
    assert json.loads(zlib.decompress(base64.b64decode(data))) == json.loads(json.dumps(saved))
    assert "connect-src &#39;none&#39;" in text
    for key in ("state?", "heads?branch=1", "map?branch=0&layer=3&head=7", "compare?branch=1&parent=0"):
        assert key in saved
