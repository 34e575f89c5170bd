"""The attention variants: each against its paper's equation, written out in loops, and in a real model."""

import inspect
import math
import re
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tinyllama
from tests.shapes import some_ids, tiny_config, tiny_model
from tinyllama.attention import AttentionContext, AttentionMask, eager
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS, kernel_name
from tinyllama.lab import restatements, smaller_caches, variants
from tinyllama.lab.kernel_file import VARIANTS
from tinyllama.parity.comparison import REFERENCES, compare_runs, kernel_run, reference_run, truths
from tinyllama.rope import RotaryEmbedding

pytestmark = [
    pytest.mark.usefixtures("no_grad", "one_thread"),
    # PyTorch says so of flex_attention, once a process.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

H, K, T, D = 4, 2, 9, 8
THETA = 10000.0
ROTARY = RotaryEmbedding(tiny_config(head_dim=D))
# With settings under which each acts on a short text.
SMALL = VARIANTS | {
    "window": partial(variants.window, size=3),
    "sinks": partial(variants.sinks, first=1, size=2),
    "softcap": partial(variants.softcap, cap=0.5),
    "topk": partial(variants.topk, keys=2),
    "online": partial(restatements.online, block=3),
}


def inputs(heads=H, kv_heads=K, length=T, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, n, length, D, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def context(length=T, layer=0, scores=lambda x: x, pattern=lambda x: x, shift=0, heads=range(H)):
    """That of two whole texts."""
    positions = torch.arange(shift, shift + length).expand(2, -1)
    return AttentionContext(
        AttentionMask.of(positions, positions, shift == 0, ROTARY),
        D**-0.5,
        layer,
        scores,
        pattern,
        heads,
        len(heads),
    )


def turned(x, shift=0):
    """RoPE, pair by pair: dimension n with n + D/2, by the angle position * theta^(-2n/D)."""
    result = torch.empty_like(x)
    half = D // 2
    for p in range(x.shape[2]):
        for n in range(half):
            angle = (p + shift) * THETA ** (-2 * n / D)
            a, b = x[:, :, p, n], x[:, :, p, n + half]
            result[:, :, p, n] = a * math.cos(angle) - b * math.sin(angle)
            result[:, :, p, n + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def softmax(scores):
    """Of a dictionary: key -> weight."""
    largest = max(scores.values())
    powers = {j: math.exp(score - largest) for j, score in scores.items()}
    return {j: power / sum(powers.values()) for j, power in powers.items()}


def dot(a, b, dimensions=range(D)):
    return sum(a[n] * b[n] for n in dimensions)


def by_loops(weights, q, k, v):
    """z_i = sum_j weight_ij v_j, where `weights(q_i, keys, i, h)` is a dictionary from j to the weight."""
    z = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            keys, values = k[b, g].tolist(), v[b, g]
            for i, query in enumerate(q[b, h].tolist()):
                for j, weight in weights(query, keys, i, h).items():
                    z[b, h, i] += weight * values[j]
    return z


def relative(z, expected):
    return ((z - expected).square().mean() / expected.square().mean()).sqrt().item()


def scores_of(query, keys, mask):
    return {j: dot(query, keys[j]) / math.sqrt(D) for j in mask}


# --- each against its equation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "visible"),
    [
        *((partial(variants.window, size=n), lambda i, j, n=n: i - n < j) for n in (1, 2, 4, T - 1, T)),
        *(
            (partial(variants.sinks, first=m, size=n), lambda i, j, m=m, n=n: i - n < j or j < m)
            for m, n in ((0, 3), (1, 1), (1, 3), (2, 4), (T, 1))
        ),
        *((kernel, lambda i, j: True) for kernel in (restatements.loops, restatements.flex)),
        *((partial(restatements.online, block=n), lambda i, j: True) for n in (1, 2, 4, T, 64)),
    ],
    ids=lambda one: kernel_name(one),
)
def test_windows_sinks_and_restatements_are_a_softmax_over_what_they_see(kernel, visible):
    q, k, v = inputs()

    def weights(query, keys, i, h):
        return softmax(scores_of(query, keys, [j for j in range(i + 1) if visible(i, j)]))

    # `loops` takes the softmax in float32, as transformers does.
    limit = 1e-6 if kernel is restatements.loops else 1e-12
    assert relative(kernel(q, k, v, context()), by_loops(weights, q, k, v)) < limit


def author_s_slopes(heads):
    """As in the authors' code: those of the power of two below, and every second one of that above."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return author_s_slopes(power) + author_s_slopes(2 * power)[0::2][: heads - power]


def test_the_slopes_are_the_paper_s():
    assert author_s_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert author_s_slopes(12)[8:] == [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (9, 3), (12, 4), (1, 1), (6, 6)])
def test_alibi_is_a_penalty_by_distance_on_unturned_queries_and_keys(heads, kv_heads):
    q, k, v = inputs(heads, kv_heads)
    slopes = author_s_slopes(heads)

    def weights(query, keys, i, h):
        return softmax({j: dot(query, keys[j]) / math.sqrt(D) - slopes[h] * (i - j) for j in range(i + 1)})

    taps = []
    of_all = context(scores=lambda x: taps.append(x) or x, heads=range(heads))
    z = variants.alibi(turned(q), turned(k), v, of_all)
    assert relative(z, by_loops(weights, q, k, v)) < 1e-12
    # With queries and keys of zero the scores are the penalty alone.
    alike = torch.zeros_like(q), torch.zeros_like(k)
    variants.alibi(*alike, v, of_all)
    for h, slope in enumerate(slopes):
        assert taps[1][0, h, T - 1, 0].item() == pytest.approx(-slope * (T - 1), rel=1e-14)
        assert taps[1][0, h, 2, 2] == 0


def test_no_positions_is_attention_on_what_was_before_rope():
    q, k, v = inputs()
    assert (
        relative(variants.no_positions(turned(q), turned(k), v, context()), eager(q, k, v, context())) < 1e-12
    )


@pytest.mark.parametrize("cap", [0.3, 50.0])
def test_softcap_bends_the_scores(cap):
    q, k, v = inputs()

    def weights(query, keys, i, h):
        scores = scores_of(query, keys, range(i + 1))
        return softmax({j: cap * math.tanh(score / cap) for j, score in scores.items()})

    taps = []
    z = variants.softcap(q, k, v, context(scores=lambda x: taps.append(x) or x), cap=cap)
    assert relative(z, by_loops(weights, q, k, v)) < 1e-12
    variants.softcap(100 * q, k, v, context(scores=lambda x: taps.append(x) or x), cap=cap)
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    # Many scores are at the cap, none is beyond it.
    assert taps[1][..., lower].abs().max() == pytest.approx(cap)


def phi(x):
    return [value + 1 if value > 0 else math.exp(value) for value in x]


def test_linear_is_the_paper_s_running_state():
    # Equations 18 to 20: S += phi(k) v^T, z += phi(k), and the output is phi(q) S / (phi(q) z).
    q, k, v = inputs()
    expected = torch.zeros_like(q)
    for b in range(2):
        for h in range(H):
            state, total = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
            for i in range(T):
                key = torch.tensor(phi(k[b, h // 2, i].tolist()), dtype=torch.float64)
                query = torch.tensor(phi(q[b, h, i].tolist()), dtype=torch.float64)
                state += torch.outer(key, v[b, h // 2, i])
                total += key
                expected[b, h, i] = query @ state / (query @ total)
    assert relative(variants.linear(q, k, v, context()), expected) < 1e-12


@pytest.mark.parametrize("layer", [0, 29])
def test_differential_is_the_difference_of_two_patterns(layer):
    # Layers count from 1 in the paper: lambda = 0.8 - 0.6 exp(-0.3 (l - 1)).
    q, k, v = inputs()
    share = 0.8 - 0.6 * math.exp(-0.3 * layer)
    # Each half of a head: the first or the last quarter of either member of the pairs.
    halves = [[0, 1, 4, 5], [2, 3, 6, 7]]

    def weights(query, keys, i, h):
        one, two = (
            softmax({j: dot(query, keys[j], half) / math.sqrt(D / 2) for j in range(i + 1)})
            for half in halves
        )
        return {j: one[j] - share * two[j] for j in one}

    z = by_loops(weights, q, k, v)
    z = z / (z.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * (1 - share)
    taps = []
    assert (
        relative(
            variants.differential(q, k, v, context(layer=layer, pattern=lambda x: taps.append(x) or x)), z
        )
        < 1e-12
    )
    (pattern,) = taps  # one, not those of the halves
    torch.testing.assert_close(pattern.sum(-1), torch.full_like(pattern[..., 0], 1 - share))


def test_differential_depends_on_distances_alone_as_naive_halves_would_not():
    q, k, v = inputs()
    z, shifted = (
        variants.differential(turned(q, shift), turned(k, shift), v, context(shift=shift))
        for shift in (0, 37)
    )
    assert relative(shifted, z) < 1e-12

    def naive(shift):
        q_turned, k_turned = turned(q, shift), turned(k, shift)
        return eager(q_turned[..., : D // 2], k_turned[..., : D // 2], v, context(shift=shift))

    assert relative(naive(37), naive(0)) > 0.01


@pytest.mark.parametrize("keys", [1, 2, 5, T, 32])
def test_topk_is_a_softmax_over_the_largest(keys):
    q, k, v = inputs()

    def weights(query, all_keys, i, h):
        scores = scores_of(query, all_keys, range(i + 1))
        return softmax(dict(sorted(scores.items(), key=lambda item: -item[1])[:keys]))

    assert relative(variants.topk(q, k, v, context(), keys=keys), by_loops(weights, q, k, v)) < 1e-12


def test_topk_keeps_equal_scores():
    q, k, v = inputs()
    z = variants.topk(torch.zeros_like(q), k, v, context(), keys=1)
    expected = by_loops(lambda query, keys, i, h: dict.fromkeys(range(i + 1), 1 / (i + 1)), q, k, v)
    assert relative(z, expected) < 1e-12


@pytest.mark.parametrize(("kv_heads", "result"), [(4, 1), (4, 2), (4, 4), (4, 8), (2, 8), (1, 8)])
def test_regroup_takes_the_mean_of_neighbours_or_repeats_them(kv_heads, result):
    q, k, v = inputs(8, kv_heads)
    share, copies = max(kv_heads // result, 1), max(result // kv_heads, 1)
    means = [
        torch.stack(
            [x[:, g // copies * share : g // copies * share + share].mean(dim=1) for g in range(result)],
            dim=1,
        )
        for x in (k, v)
    ]
    expected = by_loops(lambda query, keys, i, h: softmax(scores_of(query, keys, range(i + 1))), q, *means)
    assert relative(smaller_caches.regroup(q, k, v, context(), kv_heads=result), expected) < 1e-12
    if result >= kv_heads:
        assert relative(expected, eager(q, k, v, context())) < 1e-12


@pytest.mark.parametrize(
    ("heads", "kv_heads", "result", "expected"),
    [
        (8, 2, 3, "a divisor or a multiple of 2"),
        (9, 3, 2, "a divisor or a multiple of 3"),
        (12, 4, 3, "a divisor or a multiple of 4"),
        (12, 3, 9, "a divisor of 12"),
        (8, 2, 16, "a divisor of 8"),
        (8, 2, 0, "a divisor or a multiple of 2"),
    ],
)
def test_regroup_refuses_numbers_that_do_not_divide(heads, kv_heads, result, expected):
    with pytest.raises(InputError, match=rf"^regroup: kv_heads: expected {expected}, got {result}$"):
        smaller_caches.regroup(*inputs(heads, kv_heads), context(), kv_heads=result)


class Shapes(TorchDispatchMode):
    """The shapes of all floating tensors that are made meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Of each operation's results."""
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.add(tuple(value.shape))
        return result


def test_online_never_holds_the_scores_of_all_keys():
    length, block = 96, 8
    q, k, v = inputs(length=length)
    with Shapes() as plain:
        eager(q, k, v, context(length))
    with Shapes() as blocks:
        restatements.online(q, k, v, context(length), block=block)
    assert (2, H, length, length) in plain.seen
    assert (2, H, length, block) in blocks.seen
    # The largest tensors are the repeated values and the running sum.
    assert max(map(math.prod, blocks.seen)) == 2 * H * length * D


def test_online_survives_scores_that_overflow_an_exponential():
    # The running maximum is there for this; the largest score comes first here, and last.
    q, k, v = inputs(dtype=torch.float32)
    for scale in (100.0, -100.0):
        for kernel in (partial(restatements.online, block=2), partial(restatements.online, block=4)):
            z = kernel(scale * q, k, v, context())
            assert relative(z, eager(scale * q, k, v, context())) < 1e-5


# --- their docstrings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_short_and_names_its_paper(name):
    kernel = VARIANTS[name]
    assert kernel.__name__ == name
    assert name not in KERNELS
    assert len(inspect.getsource(kernel).splitlines()) <= 25
    assert re.search(r"\(.*arXiv:\d{4}\.\d{5}\)", kernel.__doc__ or "", re.DOTALL)
    # Settings by keyword, each with a default: a name alone is enough.
    settings = list(inspect.signature(kernel).parameters.values())[4:]
    assert all(one.kind == one.KEYWORD_ONLY and one.default is not one.empty for one in settings)


# --- in a model ------------------------------------------------------------------------------------------

PROMPTS = [some_ids(1, n, seed=n)[0].tolist() for n in (7, 3, 5)]


# The contract tries flex with caches and padding; a model of it takes seconds.
@pytest.mark.parametrize("name", [name for name in SMALL if name != "flex"])
def test_a_batch_from_a_cache_continues_each_text_as_whole_passes_do(name):
    # Ragged prompts, so that there is padding on the left; float64, so that no two ids are a tie.
    model = tiny_model(dtype=torch.float64, num_hidden_layers=2)
    model.set_attention(SMALL[name])
    steps = 3
    together = tinyllama.generate(model, PROMPTS, max_new_tokens=steps, eos_ids=())
    for prompt, new in zip(PROMPTS, together, strict=True):
        whole = model(torch.tensor([prompt + new]))[0]
        assert whole[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == new
    logits = tinyllama.prefill(model, PROMPTS, model.new_cache(3, 16), chunk=3)
    # Without a cache the keys have other positions in every row.
    columns = torch.arange(7)
    ids = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in PROMPTS])
    uncached = model(ids, positions=torch.stack([columns - 7 + len(p) for p in PROMPTS]).clamp(min=-1))
    assert relative(uncached[:, -1], logits) < (1e-6 if name == "loops" else 1e-12)
    for row, prompt in enumerate(PROMPTS):
        assert relative(logits[row], model(torch.tensor([prompt]))[0, -1]) < (
            1e-6 if name == "loops" else 1e-12
        )


def test_every_layer_may_have_its_own():
    # Fails if a kernel runs in another layer, or is told another layer's number.
    model = tiny_model(attention="sdpa", num_hidden_layers=len(SMALL))
    for layer, kernel in enumerate(SMALL.values()):
        model.set_attention(kernel, layers=[layer])
    parts = ("q_rot", "k_rot", "v_proj", "z")
    with tinyllama.capture(model, *(f"layers.*.self_attn.{part}" for part in parts)) as values:
        model(some_ids(1, 12))
    positions = torch.arange(12)[None]
    mask = AttentionMask.of(positions, positions, True, model.rotary)
    for layer, (name, kernel) in enumerate(SMALL.items()):
        q, k, v, z = (values[f"layers.{layer}.self_attn.{part}"] for part in parts)
        v = v.view(1, 12, 2, 8).transpose(1, 2)
        own = AttentionContext(mask, 8**-0.5, layer, lambda x: x, lambda x: x, range(8), 8)
        assert torch.equal(z, kernel(q, k, v, own)), name
        same = name in ("loops", "online", "flex")
        assert (relative(z, eager(q, k, v, own)) < 1e-5) == same, name
        assert model.layers[layer].self_attn.extra_repr() == f"kernel={kernel_name(kernel)}"


def test_no_positions_in_a_model_attends_with_the_projections_before_rope():
    model = tiny_model(dtype=torch.float64)
    model.set_attention(variants.no_positions)
    with tinyllama.capture(
        model, *(f"layers.1.self_attn.{x}_proj" for x in "qkv"), "layers.1.self_attn.z"
    ) as values:
        model(some_ids(2, 40))
    *projections, z = values.values()
    q, k, v = (x.view(2, 40, -1, D).transpose(1, 2) for x in projections)
    assert relative(z, eager(q, k, v, context(40))) < 1e-12


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_regroup_is_a_checkpoint_with_averaged_weights(kv_heads):
    model = tiny_model(dtype=torch.float64, num_key_value_heads=4)
    averaged = tiny_model(dtype=torch.float64, num_key_value_heads=kv_heads)
    weights = model.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.view(kv_heads, -1, 8, 64).mean(dim=1).view(-1, 64)
    averaged.load_state_dict(weights)
    ids = some_ids(2, 40)
    model.set_attention(partial(smaller_caches.regroup, kv_heads=kv_heads))
    assert relative(model(ids), averaged(ids)) < 1e-12


def test_ablating_a_head_is_patching_its_value_to_zero():
    model, ids = tiny_model(attention="sdpa"), some_ids(2, 12)
    before = model(ids)
    with tinyllama.patch(model, {"layers.2.self_attn.z": lambda z: z.index_fill(1, torch.tensor([3]), 0.0)}):
        expected = model(ids)
    model.set_attention(variants.ablate, layers=[2], heads=[3])
    assert torch.equal(model(ids), expected)
    assert not torch.equal(before, expected)


def test_restatements_pass_parity():
    model = tiny_model()
    texts = {"one": some_ids(1, 64)[0].tolist()}
    kernels = {name: VARIANTS[name] for name in ("loops", "online", "flex")}
    kernels |= {f"online {block}": partial(restatements.online, block=block) for block in (1, 5, 16)}
    others = {"softcap": VARIANTS["softcap"], "window": partial(variants.window, size=32)}
    case = compare_runs(
        {name: reference_run(model, name) for name in REFERENCES},
        {name: kernel_run(model, kernel) for name, kernel in (kernels | others).items()},
        texts,
        truths(model, texts),
        torch.float32,
    )
    rows = {row.who: row for row in case.rows}
    assert [name for name in kernels if rows[name].failures] == []
    assert all(rows[name].failures for name in others)
