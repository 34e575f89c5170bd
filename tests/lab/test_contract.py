"""The contract of attention kernels: who keeps it, and that each broken clause is found and named."""

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tinyllama
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager, masked_softmax, repeat_kv, sdpa
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS, ByHead, kernel_name
from tinyllama.lab import checks, restatements, variants
from tinyllama.lab.clauses import CLAUSES, UNBREAKABLE, breaks, broken_clauses
from tinyllama.lab.contract import check_attention
from tinyllama.lab.kernel_file import VARIANTS

# PyTorch says so of flex_attention, once a process.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def few_sizes(monkeypatch):
    """Where the sizes are not what is in question, or a kernel is slow."""
    monkeypatch.setattr(checks, "SIZES", [(1, 1), (1, 2), (2, 3), (1, 17)])


def without_compiling(monkeypatch):
    """The compiler takes most of a check's time."""
    monkeypatch.delitem(checks.CHECKS, "compile")


def broken(contract):
    """Clause -> example, of those that are broken."""
    return {clause.name: clause.example for clause in contract.clauses if clause.verdict == "BROKEN"}


def verdicts(contract):
    return {clause.name: clause.verdict for clause in contract.clauses}


# --- who keeps it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KERNELS | VARIANTS if name != "flex"])
def test_our_kernels_keep_every_clause(name):
    contract = check_attention((KERNELS | VARIANTS)[name])
    assert contract.passed, str(contract)
    declared = {"groups": "declared"} if name == "regroup" else {}
    assert verdicts(contract) == dict.fromkeys(CLAUSES, "kept") | declared
    assert contract.kernel == name


def test_flex_keeps_all_but_the_gradient_which_it_declares(monkeypatch):
    # 40 ms a call: the longer texts would take a third of the suite.
    monkeypatch.setattr(checks, "SIZES", [(1, 1), (2, 3)])
    contract = check_attention(VARIANTS["flex"])
    assert contract.passed, str(contract)
    assert verdicts(contract) == dict.fromkeys(CLAUSES, "kept") | {"gradient": "declared"}


@pytest.mark.parametrize(
    "kernel",
    [
        partial(variants.window, size=1),
        partial(variants.window, size=3),
        partial(variants.sinks, first=1, size=2),
        partial(variants.topk, keys=2),
        partial(variants.softcap, cap=0.5),
        partial(variants.regroup, kv_heads=4),
        partial(restatements.online, block=1),
        partial(restatements.online, block=7),
        ByHead(VARIANTS["linear"], [1, 2], VARIANTS["window"]),
    ],
    ids=kernel_name,
)
def test_settings_that_act_on_short_texts_keep_it_too(kernel, monkeypatch):
    # The defaults of `window` and `topk` first act at 257 and 33 keys.
    without_compiling(monkeypatch)
    monkeypatch.setattr(checks, "SIZES", [*checks.SIZES[:7], (1, 70)])
    contract = check_attention(kernel)
    assert contract.passed, str(contract)
    assert contract.kernel == kernel_name(kernel)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (4, 1, 16)])
@pytest.mark.parametrize("name", ["sdpa", "alibi", "differential", "online"])
def test_other_shapes_are_tried_where_they_are_asked_for(
    name, heads, kv_heads, head_dim, few_sizes, monkeypatch
):
    without_compiling(monkeypatch)
    shapes = set()

    def kernel(q, k, v, context):
        shapes.add((q.shape[1], q.shape[3], v.shape[3]))
        assert context.scale == head_dim**-0.5
        assert context.layer == 5
        return (KERNELS | VARIANTS)[name](q, k, v, context)

    contract = check_attention(kernel, heads, kv_heads, head_dim, layer=5)
    assert contract.passed, str(contract)
    assert shapes == {(heads, head_dim, head_dim)}


# --- planted mistakes ------------------------------------------------------------------------------------

# Each with every clause that it breaks, and how the example begins: it has to be the smallest.
PLANTED: list[Any] = []


def planted(**examples):
    def add(kernel):
        PLANTED.append(pytest.param(kernel, examples, id=kernel.__name__))
        return kernel

    return add


def attend(q, k, v, context, mask, fill=LOWEST):
    """Attention with a mask of one's own."""
    k, v = repeat_kv(q, k, v)
    scores = (q @ k.transpose(2, 3) * context.scale).float().masked_fill(~mask, fill)
    return scores.softmax(dim=-1).to(q.dtype) @ v


@planted(shape="q [1, 4, 1, 16], k and v [1, 2, 1, 16]: expected [1, 4, 1, 16], got [1, 1, 4, 16]")
def tokens_before_heads(q, k, v, context):
    return eager(q, k, v, context).transpose(1, 2)


@planted(shape="q [1, 4, 1, 16], k and v [1, 2, 1, 16]: expected [1, 4, 1, 16], got tuple")
def with_the_pattern(q, k, v, context):
    return eager(q, k, v, context), None


@planted(shape="q [1, 4, 1, 16], k and v [1, 2, 1, 16]: expected [1, 4, 1, 16], got [4, 1, 16]")
def without_a_batch(q, k, v, context):
    return eager(q, k, v, context).squeeze(0)


@planted(shape="q [1, 4, 2, 16], k and v [1, 2, 2, 16]: expected [1, 4, 2, 16], got [1, 4, 1, 16]")
def the_last_query_only(q, k, v, context):
    return eager(q, k, v, context)[:, :, -1:]


@planted(
    pure="T=1: k is changed in place; caches and later layers would see it",
    causal="T=3: token 1 changes when token 2 does",
    cache="T=2: token 1 by itself, from a cache of 2 slots, differs by",
    chunks="T=2: tokens 0 to 1 after the others differs by",
    batch="T=2: row 0 of 3 differs by",
    padding="T=1: beside a row with 1 of padding a row of 2 differs by",
    groups="T=2, H=4, K=2: it differs by",
    gradient="T=2: RuntimeError: a leaf Variable that requires grad is being used in an in-place operation",
    compile="one token, 8 keys: compiled it differs by",
)
def k_scaled_in_place(q, k, v, context):
    # Whoever has the same keys again, as every step from a cache has, sees them scaled once more.
    return eager(q, k.mul_(context.scale), v, replace(context, scale=1.0))


@planted(
    pure="T=1: q is changed in place; caches and later layers would see it",
    gradient="T=2: along q it changes by",
)
def q_clamped_in_place(q, k, v, context):
    # Doing it again changes nothing, so that few other clauses suffer.
    with torch.no_grad():
        q.clamp_(-1, 1)
    return eager(q, k, v, context)


def test_what_is_kept_between_calls_is_found():
    # A KV cache of the kernel's own, keyed by nothing.
    seen = []

    def kernel(q, k, v, context):
        seen.append(q.detach().abs().mean().float())
        return eager(q, k, v, context) * (1 + 0.01 * len(seen))

    found = broken(check_attention(kernel))
    assert found["pure"] == "T=1: the same inputs give something else the second time"


def test_dropout_that_is_never_switched_off_is_found():
    def kernel(q, k, v, context):
        return F.dropout(eager(q, k, v, context), 0.1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = broken(check_attention(kernel))
    assert found["pure"] == "T=1: the same inputs give something else the second time"
    assert {"causal", "cache", "chunks", "batch", "padding", "gradient"} <= found.keys()


@planted(
    causal="T=2: token 0 changes when token 1 does",
    cache="T=1: token 0 by itself, from a cache of 3 slots with 2 slots not yet written, differs by",
    padding="T=1: after 1 of padding it differs by",
)
def mean_of_all_keys(q, k, v, context):
    # Visible and invisible alike.
    _, v = repeat_kv(q, k, v)
    return v.mean(dim=2, keepdim=True).expand_as(q) + 0 * q * k.sum()


@planted(
    causal="T=2: token 0 changes when token 1 does",
    cache="T=1: token 0 by itself, from a cache of 3 slots with 2 slots not yet written, differs by",
    padding="T=1: after 1 of padding, into a cache, it differs by",
)
def one_token_ahead(q, k, v, context):
    # <= i + 1, off by one.
    mask = context.mask
    keys, queries = mask.key_positions[:, None, None, :], mask.query_positions[:, None, :, None]
    return attend(q, k, v, context, (keys <= queries + 1) & (keys >= 0))


@planted(
    causal="T=3: token 1 changes when token 2 does",
    cache="T=2: token 1 by itself, from a cache of 2 slots, differs by",
    chunks="T=2: tokens 1 to 1 after the others differs by",
    padding="T=2: after 1 of padding it differs by",
)
def normalised_over_the_text(q, k, v, context):
    # The first token sees itself alone whatever its query is.
    return eager(q / q.norm(dim=2, keepdim=True), k, v, context)


@planted(
    cache="T=2: token 1 by itself, from a cache of 2 slots, differs by",
    chunks="T=2: tokens 1 to 1 after the others differs by",
    padding="T=1: after 1 of padding it differs by",
)
def is_causal_always(q, k, v, context):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=context.scale, enable_gqa=True)


@planted(
    cache="T=2: token 1 by itself, from a cache of 2 slots, differs by",
    chunks="T=2: tokens 1 to 1 after the others differs by",
    padding="T=1: after 1 of padding it differs by",
)
def mask_by_index(q, k, v, context):
    # arange(T) in place of the positions.
    mask = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]
    return attend(q, k, v, context, mask)


@planted(
    cache="T=1: token 0 by itself, from a cache of 3 slots with 2 slots not yet written, differs by",
    padding="T=1: after 1 of padding it differs by",
)
def mask_by_index_from_the_end(q, k, v, context):
    # Right for a cache that is read up to the last token, and for nothing else.
    T, S = q.shape[2], k.shape[2]
    return attend(q, k, v, context, torch.ones(T, S, dtype=torch.bool).tril(S - T))


@planted(
    cache="T=3: token 2 by itself, from a cache of 5 slots with 2 slots not yet written, differs by",
    padding="T=1: after 64 of padding, into a cache, it differs by",
)
def window_from_the_last_slot(q, k, v, context):
    # Four keys, counted from the end of the cache rather than from each query: no later token's value comes
    # through, and where the keys end where the text does, the pieces agree.
    last = context.mask.key_positions.amax(dim=-1)[:, None, None, None]
    return sdpa(q, k, v, context.where(context.mask.key_positions[:, None, None, :] > last - 4))


@planted(chunks="T=3: tokens 1 to 2 after the others differs by")
def pieces_as_if_they_were_steps(q, k, v, context):
    # Only T = 1 and T = S were thought of.
    T, S = q.shape[2], k.shape[2]
    return eager(q, k, v, context) if T in (1, S) else eager(q.flip(2), k, v, context)


@planted(batch="T=1: row 0 of 3 differs by", padding="T=1: after 1 of padding it differs by")
def softmax_over_rows(q, k, v, context):
    z = eager(q, k, v, context)
    return z * z.softmax(dim=0)


@planted(batch="T=2: row 0 of 3 differs by", padding="T=1: beside a row with 1 of padding a row of 2")
def scores_less_the_mean_of_the_batch(q, k, v, context):
    return eager(q, k - k.mean(dim=0, keepdim=True) * (k.shape[0] > 1), v, context)


@planted(
    batch="T=1: row 1 of 3 differs by", padding="T=1: beside a row with 1 of padding a row of 2 differs by"
)
def the_first_row_s_values(q, k, v, context):
    return eager(q, k, v[:1].expand_as(v), context)


@planted(padding="T=1: after 1 of padding it differs by")
def normalised_over_padding_too(q, k, v, context):
    # Linear attention by a running sum: what stands in the padding is added up with the rest.
    k, v = repeat_kv(q, k, v)
    phi_q, phi_k = F.elu(q.float()) + 1, F.elu(k.float()) + 1
    positions = context.mask.query_positions[:, None, :, None]
    seen = context.mask.key_positions[:, None, None, :] <= positions
    weights = phi_q @ phi_k.transpose(2, 3) * seen
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)).to(q.dtype) @ v


@planted(padding="T=1: after 1 of padding it differs by")
def padding_is_seen(q, k, v, context):
    mask = context.mask
    mask = mask.key_positions[:, None, None, :] <= mask.query_positions[:, None, :, None]
    return attend(q, k, v, context, mask)


@planted(groups="T=1, H=4, K=2: it differs by")
def tiled_kv_heads(q, k, v, context):
    # repeat for repeat_interleave: head h reads h % K.
    G = q.shape[1] // k.shape[1]
    return eager(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1), context)


@planted(groups="T=2, H=4, K=2: it differs by")
def tiled_keys_but_repeated_values(q, k, v, context):
    # One token has but one key to look at, so that two are needed to see it.
    G = q.shape[1] // k.shape[1]
    return eager(q, k.repeat(1, G, 1, 1), v.repeat_interleave(G, dim=1), context)


@planted(dtype="T=1: expected float64, got float32")
def float32_always(q, k, v, context):
    return eager(q.float(), k.float(), v.float(), context)


@planted(dtype="T=1: expected bfloat16, got float32")
def float32_for_bfloat16(q, k, v, context):
    k, v = repeat_kv(q, k, v)
    working = torch.promote_types(q.dtype, torch.float32)
    return masked_softmax(q.to(working) @ k.to(working).transpose(2, 3) * context.scale, context) @ v.to(
        working
    )


@planted(
    finite="T=1, float64: 1 of padding gives something that is not finite",
    gradient="T=2: with 1 of padding the gradient of v is not finite",
)
def filled_with_inf(q, k, v, context):
    k, v = repeat_kv(q, k, v)
    scores = (q @ k.transpose(2, 3) * context.scale).masked_fill(~context.mask.allowed, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@planted(
    finite="T=1, float64: 1 of padding gives something that is not finite",
    gradient="T=2: with 1 of padding the gradient of v is not finite",
)
def divided_by_an_empty_sum(q, k, v, context):
    k, v = repeat_kv(q, k, v)
    scores = (q @ k.transpose(2, 3) * context.scale).to(torch.promote_types(q.dtype, torch.float32))
    largest = scores.masked_fill(~context.mask.allowed, torch.finfo(scores.dtype).min).amax(-1, keepdim=True)
    weights = (scores - largest.clamp(min=-1e4)).clamp(max=0).exp() * context.mask.allowed
    return (weights / weights.sum(-1, keepdim=True)).to(q.dtype) @ v


@planted(
    finite="T=1, float16: 1 of padding gives something that is not finite",
)
def inf_in_float16_alone(q, k, v, context):
    # -1e9 is a usual fill, and -inf in float16.
    k, v = repeat_kv(q, k, v)
    bias = torch.zeros(context.mask.allowed.shape).masked_fill(~context.mask.allowed, -1e9).to(q.dtype)
    scores = q @ k.transpose(2, 3) * context.scale + bias
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@planted(gradient="T=2: along q it changes by")
def detached_pattern(q, k, v, context):
    return eager(q, k, v, replace(context, pattern=lambda x: x.detach()))


@planted(gradient="T=2: along q it changes by")
def without_gradients(q, k, v, context):
    with torch.no_grad():
        return eager(q, k, v, context)


@planted(gradient="T=2: along k it changes by")
def keys_of_a_cache_detached(q, k, v, context):
    return eager(q, k.detach(), v, context)


@planted(compile="one token, 8 keys: ")
def branch_over_data(q, k, v, context):
    if bool((context.mask.query_positions < 0).any()):
        return eager(q, k, v, context)
    return sdpa(q, k, v, context)


@planted(compile="one token, 8 keys: ")
def a_length_by_item(q, k, v, context):
    S = int(context.mask.query_positions.max().item()) + 1
    near = context.where(context.mask.key_positions[:, None, None, :] < S)
    return sdpa(q, k, v, near) if S > 0 else eager(q, k, v, context)


@planted(compile="one token, 8 keys: ")
def a_log_on_the_way(q, k, v, context):
    torch._dynamo.graph_break()
    return eager(q, k, v, context)


@planted(compile="one token, 8 keys: compiled it differs by 1.9e+00 of its RMS")
def doubled_when_compiled(q, k, v, context):
    return eager(q, k, v, context) * (2 if torch.compiler.is_compiling() else 1)


@pytest.mark.parametrize(("kernel", "expected"), PLANTED)
def test_a_planted_mistake_breaks_these_clauses_and_no_other(kernel, expected, monkeypatch):
    monkeypatch.setattr(checks, "SIZES", checks.SIZES[:7])  # all of them show by 17 tokens
    if "compile" not in expected:
        without_compiling(monkeypatch)
    contract = check_attention(kernel)
    found = broken(contract)
    assert not contract.passed
    assert found.keys() == expected.keys(), str(contract)
    for clause, example in expected.items():
        assert found[clause].startswith(example)


def test_every_clause_has_a_mistake_that_breaks_it():
    assert {clause for kernel in PLANTED for clause in kernel.values[1]} == set(CLAUSES)


def test_each_clause_is_tried_by_a_check_of_its_own(monkeypatch):
    assert list(checks.CHECKS) == list(CLAUSES)
    asked = []
    for name in CLAUSES:
        monkeypatch.setitem(checks.CHECKS, name, lambda trial, name=name: asked.append(name) or iter([name]))
    contract = check_attention(eager)
    assert asked == ["shape"]  # without a shape no other clause means anything
    assert broken(contract) == {"shape": "shape"}
    monkeypatch.setitem(checks.CHECKS, "shape", lambda trial: iter([]))
    assert broken(check_attention(eager)) == {name: name for name in CLAUSES if name != "shape"}


# --- what is said ----------------------------------------------------------------------------------------


def test_the_contract_is_said_in_a_line_for_each_clause(few_sizes):
    lines = str(check_attention(is_causal_always)).splitlines()
    assert len(lines) == 1 + len(CLAUSES)
    assert lines[0] == "is_causal_always: BREAKS the contract"
    assert lines[1] == "  kept     shape     gives (B, H, T, D), for any number of rows, queries and keys"
    assert lines[3] == "  kept     causal    a later token changes no bit of what comes before it"
    assert lines[4] == (
        "  BROKEN   cache     T=2: token 1 by itself, from a cache of 2 slots, differs by 1.5e+00 of its RMS"
    )
    assert str(check_attention(eager)).startswith("eager: keeps the contract\n  kept     shape     gives (B")


@pytest.mark.parametrize(
    ("kernel", "clause", "example"),
    [
        (
            tiled_kv_heads,
            "groups",
            "T=1, H=4, K=2: it differs by 1.5e+00 of its RMS from that with KV heads repeated 2 times",
        ),
        (
            detached_pattern,
            "gradient",
            "T=2: along q it changes by -2.98e-01, by its gradient 0.00e+00",
        ),
        (padding_is_seen, "padding", "T=1: after 1 of padding it differs by 9.2e+02 of its RMS"),
        (softmax_over_rows, "batch", "T=1: row 0 of 3 differs by 7.5e-01 of its RMS from that row alone"),
    ],
)
def test_an_example_says_where_and_by_how_much(kernel, clause, example, few_sizes, monkeypatch):
    without_compiling(monkeypatch)
    assert broken(check_attention(kernel))[clause] == example


def test_an_error_is_named_with_the_line_of_the_kernel_s_own_file():
    def kernel(q, k, v, context):
        return F.softmax(q @ k, dim=-1)  # here

    # Raised within a kernel of ours that this one calls: the line is still this file's.
    def calling(q, k, v, context):
        return sdpa(q, k[..., :-1], v, context)  # there

    contract = check_attention(kernel)
    line = kernel.__code__.co_firstlineno + 1
    assert broken(contract) == {
        "shape": "T=1: RuntimeError: The size of tensor a (4) must match the size of tensor b (2) at "
        f"non-singleton dimension 1 (line {line}: return F.softmax(q @ k, dim=-1)  # here)"
    }
    assert len(contract.clauses) == 1  # nothing else is tried
    (clause,) = check_attention(calling).clauses
    line = calling.__code__.co_firstlineno + 1
    assert clause.example is not None
    assert clause.example.endswith(f"(line {line}: return sdpa(q, k[..., :-1], v, context)  # there)")
    assert str(contract).count("\n") == 1


def test_an_error_in_one_clause_leaves_the_others_to_be_tried(few_sizes):
    def kernel(q, k, v, context):
        if q.dtype == torch.bfloat16:
            raise NotImplementedError("no bfloat16 here\nand more")
        return eager(q, k, v, context)

    contract = check_attention(kernel)
    assert [clause.name for clause in contract.clauses] == list(CLAUSES)
    assert broken(contract).keys() == {"dtype", "finite"}
    assert broken(contract)["dtype"].startswith("T=1: NotImplementedError: no bfloat16 here (line ")


# --- what is declared ------------------------------------------------------------------------------------


def declared(clause, kernel=eager):
    """A kernel of its own that declares it."""

    @breaks(clause)
    def declaring(q, k, v, context):
        return kernel(q, k, v, context)

    return declaring


def test_a_declared_clause_may_be_broken(few_sizes, monkeypatch):
    without_compiling(monkeypatch)
    silent, said = check_attention(detached_pattern), check_attention(declared("gradient", detached_pattern))
    assert verdicts(silent)["gradient"] == "BROKEN"
    assert not silent.passed
    assert verdicts(said)["gradient"] == "declared"
    assert said.passed
    assert str(said).startswith("declaring: keeps the contract")
    assert "declared in vain" not in str(said)
    # Declared is one thing, what else is broken another.
    other = check_attention(declared("gradient", tiled_kv_heads))
    assert broken(other).keys() == {"groups"}


@pytest.mark.parametrize("clause", ["causal", "groups", "dtype", "finite", "gradient"])
def test_a_clause_that_is_kept_is_declared_in_vain(clause, few_sizes, monkeypatch):
    without_compiling(monkeypatch)
    contract = check_attention(declared(clause))
    assert contract.passed
    assert verdicts(contract)[clause] == "kept"
    assert [line for line in str(contract).splitlines() if line.endswith("; declared in vain")] == [
        f"  kept     {clause:<9} {CLAUSES[clause]}; declared in vain"
    ]


@pytest.mark.parametrize("clause", ["cach", "", "Cache", *UNBREAKABLE])
def test_what_cannot_be_broken_cannot_be_declared(clause):
    with pytest.raises(InputError, match=f"breaks: expected some of causal, cache, .*, got '{clause}'"):
        breaks("gradient", clause)


def test_a_declaration_is_seen_through_settings_and_heads():
    assert broken_clauses(eager) == frozenset()
    both = breaks("cache", "batch")(lambda q, k, v, context: q)
    assert broken_clauses(partial(both)) == broken_clauses(both) == {"cache", "batch"}
    assert broken_clauses(ByHead(eager, [0], partial(both))) == {"cache", "batch"}
    assert broken_clauses(ByHead(declared("padding"), [0], both)) == {"cache", "batch", "padding"}
    assert broken_clauses(VARIANTS["flex"]) == {"gradient"}


def test_a_declaring_kernel_keeps_its_name_text_and_settings():
    @breaks("compile")
    def named(q, k, v, context, *, size=3):
        """Text."""
        return q * size

    assert named.__name__ == kernel_name(named) == "named"
    assert named.__doc__ == "Text."
    with torch.no_grad():
        model = tiny_model()
        model.set_attention(partial(named, size=0))
        zero = tiny_model()
        zero.set_attention(VARIANTS["ablate"])
        assert torch.equal(model(some_ids(1, 5)), zero(some_ids(1, 5)))


PROMPT = some_ids(1, 6)[0].tolist()
WRAPPED = {
    "itself": lambda kernel: kernel,
    "partial": partial,
    "by head": lambda kernel: ByHead(kernel, [1], eager),
    "the other heads": lambda kernel: ByHead(eager, [1], partial(kernel)),
}


def run(model, prompts=(PROMPT,), chunk=512, new=0):
    """Prefill in pieces, and some steps."""
    cache = model.new_cache(len(prompts), 16)
    logits = tinyllama.prefill(model, prompts, cache, chunk=chunk)
    if new:
        tinyllama.generate(model, prompts, max_new_tokens=new, eos_ids=())
    return logits


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize(
    ("clause", "refused", "got"),
    [
        ("cache", {"new": 2}, "1 query for 7 keys of a cache"),
        ("chunks", {"chunk": 4}, "2 queries for 6 keys"),
        ("batch", {"prompts": (PROMPT, PROMPT)}, "2 rows"),
        ("padding", {"prompts": (PROMPT, PROMPT[:-1])}, "padding on the left"),
    ],
)
def test_a_pass_that_needs_a_declared_clause_is_refused(clause, refused, got, wrapped):
    model = tiny_model()
    expected = model(torch.tensor([PROMPT]))
    model.set_attention(WRAPPED[wrapped](declared(clause)), layers=[2])
    # A whole text by itself is right, and so is what another clause is about.
    assert torch.equal(model(torch.tensor([PROMPT])), expected)
    others = {"new": {"new": 1}, "chunk": {"chunk": 5}, "prompts": {}}
    run(model, **others[next(iter(refused))])
    if clause == "padding":
        run(model, prompts=(PROMPT, PROMPT))
    with pytest.raises(InputError) as error:
        run(model, **refused)
    assert str(error.value) == (
        f"declaring: got {got}, but it declares that it breaks {clause}; run it on whole texts, each alone"
    )


def test_what_is_not_declared_is_not_refused():
    # Clauses that no forward pass can see, and each pass but the one that is declared.
    model = tiny_model()
    model.set_attention(breaks("causal", "groups", "dtype", "finite", "gradient", "compile")(eager))
    run(model, prompts=(PROMPT, PROMPT[:-1]), chunk=4, new=2)
    model.set_attention(declared("cache"))
    run(model, prompts=(PROMPT, PROMPT[:-2]), chunk=3)
    model.set_attention(declared("chunks"))
    run(model, prompts=(PROMPT, PROMPT[:-2]), new=2)
    model.set_attention(declared("batch"))
    run(model, chunk=4, new=2)
    model.set_attention(declared("padding"))
    run(model, prompts=(PROMPT, PROMPT), chunk=4, new=2)


@pytest.mark.parametrize("clause", ["cache", "chunks", "batch", "padding"])
def test_what_a_pass_refuses_is_tried_all_the_same(clause, few_sizes):
    # The refusal is for those who use the kernel; who checks it wants to know whether it is true.
    contract = check_attention(declared(clause))
    assert contract.passed, str(contract)
    assert verdicts(contract) == dict.fromkeys(CLAUSES, "kept")
    assert "declared in vain" in str(contract)


# --- what the check does not find yet ----------------------------------------------------------------------


def changes_keys_beside_a_mask(q, k, v, context):
    # Only whole texts without padding are tried for it.
    if not context.mask.causal:
        with torch.no_grad():
            k.clamp_(-1, 1)
    return eager(q, k, v, context)


def narrows_the_mask_in_place(q, k, v, context):
    # The mask is one for all layers of a pass: those after this one would have the window, too.
    mask = context.mask
    distance = mask.query_positions[:, None, :, None] - mask.key_positions[:, None, None, :]
    mask.allowed.logical_and_(distance < 4)
    return eager(q, k, v, context)


def masks_all_rows_by_the_first(q, k, v, context):
    # It is the first row, with padding, that is looked at.
    return eager(q, k, v, replace(context, allowed=replace(context.mask, mask=context.mask.allowed[:1])))


def reads_the_first_kv_head_only(q, k, v, context):
    return eager(q, k[:, :1], v[:, :1], context)


def reads_the_kv_heads_backwards(q, k, v, context):
    return eager(q, k.flip(1), v.flip(1), context)


def computes_float64_in_float32(q, k, v, context):
    return eager(q.float(), k.float(), v.float(), context).to(q.dtype)


def detaches_queries_beside_a_mask(q, k, v, context):
    return eager(q if context.mask.causal else q.detach(), k, v, context)


def takes_an_item_into_the_graph(q, k, v, context):
    # On a GPU every step would wait for it; see tests/test_compile.py.
    return eager(q, k, v, context) + 0 * context.mask.query_positions[0, 0].item()


@pytest.mark.parametrize(
    ("clause", "kernel"),
    [
        ("pure", changes_keys_beside_a_mask),
        ("pure", narrows_the_mask_in_place),
        ("padding", masks_all_rows_by_the_first),
        ("groups", reads_the_first_kv_head_only),
        ("groups", reads_the_kv_heads_backwards),
        ("gradient", detaches_queries_beside_a_mask),
        ("compile", takes_an_item_into_the_graph),
    ],
)
def test_this_is_found_as_well(clause, kernel, few_sizes, monkeypatch):
    if clause != "compile":
        without_compiling(monkeypatch)
    assert clause in broken(check_attention(kernel))


@pytest.mark.parametrize("wrapped", ["declared", "module"])
def test_the_line_is_the_kernel_s_own_through_what_is_around_it(wrapped):
    def kernel(q, k, v, context):
        return sdpa(q, k[..., :-1], v, context)  # mine

    class Module(torch.nn.Module):
        def forward(self, q, k, v, context):
            return sdpa(q, k[..., :-1], v, context)  # mine

    (clause,) = check_attention(breaks("cache")(kernel) if wrapped == "declared" else Module()).clauses
    assert clause.example is not None
    assert clause.example.endswith("return sdpa(q, k[..., :-1], v, context)  # mine)")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(InputError):
        check_attention(eager, heads=4, kv_heads=3)


# --- what the check leaves alone -------------------------------------------------------------------------


def test_checking_often_is_always_the_same_and_draws_no_random_number(monkeypatch):
    # torch.compile gives a function up after 8 graphs, by default.
    monkeypatch.setattr(checks, "SIZES", [(1, 1), (2, 3)])
    state = torch.get_rng_state()
    first = check_attention(VARIANTS["ablate"])
    assert verdicts(first)["compile"] == "kept"
    for _ in range(19):
        assert check_attention(VARIANTS["ablate"]) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_that_the_user_compiled_stays_compiled(few_sizes):
    # Fails if the check resets the compiler: a model would be compiled anew, which takes minutes on a GPU.
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @functools.partial(torch.compile, fullgraph=True, backend=count)
    def mine(x):
        return sdpa(x, x, x, context)

    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    context = checks_context(3, 4)
    expected = mine(x)
    for kernel in (sdpa, branch_over_data):
        check_attention(kernel)
    assert torch.equal(mine(x), expected)
    assert len(graphs) == 1


def checks_context(T, D):
    """That of a whole text."""
    contexts = []
    model = tiny_model(num_hidden_layers=1)
    model.set_attention(lambda q, k, v, context: contexts.append(context) or q)
    with torch.no_grad():
        model(some_ids(1, T))
    return replace(contexts[0], scale=D**-0.5, scores=torch.nn.Identity(), pattern=torch.nn.Identity())


def test_the_caller_s_setting_of_gradients_comes_back(few_sizes):
    check_attention(detached_pattern)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        check_attention(branch_over_data)
        assert not torch.is_grad_enabled()
