"""The contract of attention kernels: which kernels keep it, and that broken clauses are found and named."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import tinyllama
from tests.lab import mistakes
from tests.lab.mistakes import PLANTED
from tests.shapes import some_ids, tiny_model
from tinyllama.attention import eager, sdpa
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS, ByHead, kernel_name
from tinyllama.lab import restatements, smaller_caches, variants
from tinyllama.lab.clauses import CLAUSES, UNBREAKABLE, breaks, broken_clauses
from tinyllama.lab.contract import check_attention
from tinyllama.lab.kernel_file import VARIANTS

# PyTorch says so of flex_attention, once a process.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

# The compiler takes most of a check's time.
WITHOUT_COMPILE = tuple(name for name in CLAUSES if name != "compile")


def broken(contract):
    """Clause -> example, of those that are broken."""
    return {clause.name: clause.example for clause in contract.clauses if clause.verdict == "BROKEN"}


def verdicts(contract):
    return {clause.name: clause.verdict for clause in contract.clauses}


# --- kernels that keep it --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KERNELS, *VARIANTS])
def test_our_kernels_keep_every_clause_that_they_do_not_declare_broken(name):
    # One query at a time, or 40 ms a call: longer texts would take a minute.
    longest = {"loops": 8, "flex": 2}.get(name, 300)
    contract = check_attention((KERNELS | VARIANTS)[name], longest=longest)
    clause = {"regroup": "groups", "quantised": "gradient", "flex": "gradient"}.get(name)
    declared = {clause: "declared"} if clause else {}
    assert verdicts(contract) == dict.fromkeys(CLAUSES, "kept") | declared, str(contract)
    assert contract.passed
    assert contract.kernel == name


@pytest.mark.parametrize(
    "kernel",
    [
        partial(variants.window, size=1),
        partial(variants.window, size=3),
        partial(variants.sinks, first=1, size=2),
        partial(variants.topk, keys=2),
        partial(variants.softcap, cap=0.5),
        partial(smaller_caches.regroup, kv_heads=4),
        partial(smaller_caches.quantised, bits=8),
        partial(restatements.online, block=1),
        partial(restatements.online, block=7),
        ByHead(VARIANTS["linear"], [1, 2], VARIANTS["window"]),
    ],
    ids=kernel_name,
)
def test_settings_that_act_on_short_texts_keep_it_too(kernel):
    # The defaults of `window` and `topk` first act at 257 and 33 keys.
    contract = check_attention(kernel, clauses=WITHOUT_COMPILE, longest=17)
    assert contract.passed, str(contract)
    assert contract.kernel == kernel_name(kernel)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (4, 1, 16)])
@pytest.mark.parametrize("name", ["sdpa", "alibi", "differential", "online"])
def test_other_shapes_are_checked_on_request(name, heads, kv_heads, head_dim):
    shapes = set()

    def kernel(q, k, v, context):
        shapes.add((q.shape[1], q.shape[3], v.shape[3]))
        assert context.scale == head_dim**-0.5
        assert context.layer == 5
        return (KERNELS | VARIANTS)[name](q, k, v, context)

    shape = heads, kv_heads, head_dim
    contract = check_attention(kernel, *shape, layer=5, clauses=WITHOUT_COMPILE, longest=3)
    assert contract.passed, str(contract)
    assert shapes == {(heads, head_dim, head_dim)}


# --- planted mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", PLANTED, ids=kernel_name)
def test_a_planted_mistake_breaks_these_clauses_and_no_other(kernel):
    expected = PLANTED[kernel]
    clauses = CLAUSES if "compile" in expected else WITHOUT_COMPILE
    contract = check_attention(kernel, clauses=clauses, longest=17)  # all show by then
    found = broken(contract)
    assert not contract.passed
    smallest = {name: int(example[2:].split(":")[0]) for name, example in found.items()}
    assert smallest == expected, str(contract)


def test_every_clause_has_a_mistake_that_breaks_it():
    assert {clause for expected in PLANTED.values() for clause in expected} == set(CLAUSES)


def counting():
    # A cache of the kernel's own: another result for the same inputs each time.
    seen = []
    return lambda q, k, v, context: seen.append(q) or eager(q, k, v, context) * (1 + 0.01 * len(seen))


@pytest.mark.parametrize(
    "kernel",
    [counting(), lambda q, k, v, context: F.dropout(eager(q, k, v, context), 0.1)],
    ids=["kept between calls", "dropout that is never switched off"],
)
def test_a_result_that_changes_from_call_to_call_is_found(kernel):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert "second time" in broken(check_attention(kernel, clauses=["pure"], longest=3))["pure"]


def test_only_the_clauses_asked_for_are_checked():
    contract = check_attention(mistakes.is_causal_always, clauses=["causal", "cache"], longest=3)
    assert verdicts(contract) == {"causal": "kept", "cache": "BROKEN"}
    with pytest.raises(InputError, match=r"clauses: expected some of shape, pure, .*, got 'cash'"):
        check_attention(eager, clauses=["cash"])


# --- what the report says --------------------------------------------------------------------------------


def test_the_report_has_a_line_for_each_clause():
    contract = check_attention(mistakes.is_causal_always, longest=3)
    *lines, remedy = str(contract).splitlines()
    assert remedy.strip() == contract.remedy
    assert len(lines) == 1 + len(CLAUSES)
    assert lines[0] == "is_causal_always: BREAKS the contract"
    assert [line.split()[:2] for line in lines[1:]] == [[one.verdict, one.name] for one in contract.clauses]
    assert lines[3].endswith(CLAUSES["causal"])
    assert lines[4].endswith(broken(contract)["cache"])
    assert str(check_attention(eager, longest=3)).startswith("eager: keeps the contract\n")


@pytest.mark.parametrize(
    ("kernel", "clause", "parts"),
    [
        (mistakes.one_token_ahead, "causal", ["T=2", "token 0 ", "token 1 "]),
        (mistakes.mean_of_all_keys, "cache", ["T=1", "token 0 ", "3 slots, 2 of them"]),
        (mistakes.pieces_as_if_they_were_steps, "chunks", ["T=3", "tokens 1 to 2"]),
        (mistakes.window_from_the_last_slot, "padding", ["T=1", "after 64 of padding with a cache"]),
        (mistakes.the_first_row_s_values, "batch", ["T=1", "row 1 of 3"]),
        (mistakes.tiled_kv_heads, "groups", ["T=1", "H=4, K=2", "differs by 1.5e+00 of its RMS"]),
        (mistakes.float32_for_bfloat16, "dtype", ["T=1", "expected bfloat16, got float32"]),
        (mistakes.inf_in_float16_alone, "finite", ["T=1", "float16", "1 of padding"]),
        (mistakes.keys_of_a_cache_detached, "gradient", ["T=2", "the gradient of k"]),
        (mistakes.the_last_query_only, "shape", ["T=2", "[1, 4, 2, 16]", "returned [1, 4, 1, 16]"]),
        (mistakes.with_the_pattern, "shape", ["T=1", "mistakes.py:", "[1, 4, 1, 16]", "returned tuple"]),
    ],
)
def test_an_example_says_where_and_what(kernel, clause, parts):
    example = broken(check_attention(kernel, clauses=[clause], longest=3))[clause]
    assert all(part in example for part in parts), example


class Failing(torch.nn.Module):
    def forward(self, q, k, v, context):
        return sdpa(q, k[..., :-1], v, context)  # mine


def failing(q, k, v, context):
    return sdpa(q, k[..., :-1], v, context)  # mine


@pytest.mark.parametrize("kernel", [failing, partial(failing), breaks("cache")(failing), Failing()])
def test_an_error_is_named_with_the_line_of_the_kernel_s_own_file(kernel):
    # The error is raised in sdpa, which the kernel calls. Without a shape no other clause is checked.
    (clause,) = check_attention(kernel).clauses
    assert (clause.name, clause.verdict) == ("shape", "BROKEN")
    assert clause.example.startswith("T=1: RuntimeError: ")
    assert clause.example.endswith("return sdpa(q, k[..., :-1], v, context)  # mine)")


def test_an_error_in_one_clause_leaves_the_others_to_be_checked():
    def kernel(q, k, v, context):
        if q.dtype == torch.bfloat16:
            raise NotImplementedError("no bfloat16 here\nand more")
        return eager(q, k, v, context)

    contract = check_attention(kernel, longest=3)
    assert [clause.name for clause in contract.clauses] == list(CLAUSES)
    assert broken(contract).keys() == {"dtype", "finite"}
    assert broken(contract)["dtype"].startswith(f"T=1: NotImplementedError: no bfloat16 here ({__file__}:")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="4 query heads cannot share 3 KV heads"):
        check_attention(eager, heads=4, kv_heads=3)


# --- declarations ----------------------------------------------------------------------------------------


def declared(clause, kernel=eager):
    """A kernel that declares a clause broken."""

    @breaks(clause)
    def declaring(q, k, v, context):
        return kernel(q, k, v, context)

    return declaring


def test_a_declared_clause_may_be_broken_and_no_other():
    said, other = (
        check_attention(declared("gradient", kernel), clauses=WITHOUT_COMPILE, longest=3)
        for kernel in (mistakes.detached_pattern, mistakes.tiled_kv_heads)
    )
    assert verdicts(said)["gradient"] == "declared"
    assert said.passed
    assert "declared broken, but it holds" not in str(said)
    assert broken(other).keys() == {"groups"}


@pytest.mark.parametrize("clause", [name for name in WITHOUT_COMPILE if name not in UNBREAKABLE])
def test_a_declared_clause_that_holds_is_kept_and_said_to_hold(clause):
    # The check calls the kernel without the refusals that a forward pass gets.
    contract = check_attention(declared(clause), clauses=WITHOUT_COMPILE, longest=3)
    assert verdicts(contract) == dict.fromkeys(WITHOUT_COMPILE, "kept"), str(contract)
    (line,) = [line for line in str(contract).splitlines() if "declared broken, but it holds" in line]
    assert line.split()[:2] == ["kept", clause]


@pytest.mark.parametrize("clause", ["cach", "", "Cache", *UNBREAKABLE])
def test_some_clauses_cannot_be_declared(clause):
    with pytest.raises(InputError, match=f"breaks: expected some of causal, cache, .*, got '{clause}'"):
        breaks("gradient", clause)


def test_what_is_broken_is_said_with_its_remedy():
    contract = check_attention(mistakes.tiled_kv_heads, clauses=["shape", "groups"], longest=3)
    assert '@tinyllama.lab.breaks("groups")' in str(contract)
    assert "--breaks groups" in str(contract)
    without_a_shape = check_attention(mistakes.the_last_query_only, longest=3)
    assert "breaks(" not in str(without_a_shape)  # which nothing can be measured without
    assert "breaks(" not in str(check_attention(eager, clauses=["shape", "groups"], longest=3))


class Detached(torch.nn.Module):
    """A kernel with a weight, whose gradient is wrong."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, q, k, v, context):
        return eager(q, k, v.detach(), context) * self.weight


def test_a_module_that_declares_a_clause_keeps_its_weights_and_refuses_as_a_function_does():
    kernel = breaks("gradient", "batch")(Detached())
    assert [name for name, _ in kernel.named_parameters()] == ["weight"]
    assert verdicts(check_attention(kernel, clauses=["gradient", "batch"], longest=3)) == {
        "gradient": "declared",
        "batch": "kept",
    }
    model = tiny_model()
    model.set_attention(kernel)
    run(model)
    with pytest.raises(InputError, match="Detached: got 2 rows"):
        run(model, **NEEDS["batch"])
    with pytest.raises(InputError, match=r"got the class Detached; .*breaks\(...\)\(Detached\(\)\)"):
        breaks("batch")(Detached)


def test_declarations_add_up():
    twice = breaks("cache")(partial(declared("batch")))
    assert broken_clauses(twice) == {"cache", "batch"}
    assert kernel_name(twice) == "declaring"
    model = tiny_model()
    model.set_attention(twice)
    for clause in ("cache", "batch"):
        with pytest.raises(InputError, match="it declares that it breaks"):
            run(model, **NEEDS[clause])
    assert check_attention(twice, clauses=["cache", "batch"], longest=3).passed


def test_a_declaration_is_seen_through_settings_and_heads():
    assert broken_clauses(eager) == frozenset()
    both = breaks("cache", "batch")(lambda q, k, v, context: q)
    assert broken_clauses(partial(both)) == broken_clauses(both) == {"cache", "batch"}
    assert broken_clauses(ByHead(eager, [0], partial(both))) == {"cache", "batch"}
    assert broken_clauses(ByHead(declared("padding"), [0], both)) == {"cache", "batch", "padding"}


def test_a_declaring_kernel_keeps_its_name_docstring_and_settings():
    @breaks("compile")
    def named(q, k, v, context, *, size=3):
        """Text."""
        return q * size

    assert named.__name__ == kernel_name(named) == "named"
    assert named.__doc__ == "Text."
    x = torch.ones(1, 1, 1, 1)
    assert partial(named, size=0)(x, x, x, None) == 0


PROMPT = some_ids(1, 6)[0].tolist()
# What a pass needs: the arguments of `run`.
NEEDS = {
    "cache": {"new": 2},
    "chunks": {"chunk": 4},
    "batch": {"prompts": (PROMPT, PROMPT)},
    "padding": {"prompts": (PROMPT, PROMPT[:-1])},
}


def run(model, prompts=(PROMPT,), chunk=512, new=0):
    """Prefill in pieces, and some steps."""
    tinyllama.prefill(model, prompts, model.new_cache(len(prompts), 16), chunk=chunk)
    if new:
        tinyllama.generate(model, prompts, max_new_tokens=new, eos_ids=())


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda kernel: kernel,
        partial,
        lambda kernel: ByHead(kernel, [1], eager),
        lambda kernel: ByHead(eager, [1], partial(kernel)),
    ],
    ids=["itself", "partial", "by head", "the other heads"],
)
@pytest.mark.parametrize(
    ("clause", "got"),
    [
        ("cache", "1 query for 7 keys of a cache"),
        ("chunks", "2 queries for 6 keys"),
        ("batch", "2 rows"),
        ("padding", "padding on the left"),
    ],
)
def test_a_pass_that_needs_a_declared_clause_is_refused(clause, got, wrapped):
    model = tiny_model()
    expected = model(torch.tensor([PROMPT]))
    model.set_attention(wrapped(declared(clause)), layers=[2])
    assert torch.equal(model(torch.tensor([PROMPT])), expected)  # a whole text alone needs none
    with pytest.raises(InputError, match=f"declaring: got {got}, but it declares that it breaks {clause}; "):
        run(model, **NEEDS[clause])


@pytest.mark.parametrize(
    ("clauses", "allowed"),
    [
        (
            ["causal", "groups", "dtype", "finite", "gradient", "compile"],
            {"prompts": (PROMPT, PROMPT[:-1]), "chunk": 4, "new": 2},
        ),
        (["cache"], {"prompts": (PROMPT, PROMPT[:-2]), "chunk": 3}),
        (["chunks"], {"prompts": (PROMPT, PROMPT[:-2]), "new": 2}),
        (["batch"], {"chunk": 4, "new": 2}),
        (["padding"], {"prompts": (PROMPT, PROMPT), "chunk": 4, "new": 2}),
    ],
)
def test_a_pass_that_needs_no_declared_clause_runs(clauses, allowed):
    model = tiny_model()
    model.set_attention(breaks(*clauses)(eager))
    run(model, **allowed)


# --- what the check leaves alone -------------------------------------------------------------------------


def test_checking_often_gives_the_same_and_draws_no_random_number():
    # By default torch.compile stops compiling a function after 8 graphs.
    state = torch.get_rng_state()
    first = check_attention(VARIANTS["ablate"], clauses=["compile"])
    assert verdicts(first)["compile"] == "kept"
    for _ in range(9):
        assert check_attention(VARIANTS["ablate"], clauses=["compile"]) == first
    check_attention(VARIANTS["ablate"], longest=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_that_the_user_compiled_stays_compiled():
    # Fails if the check resets the compiler: a model would be compiled again, which takes minutes on a GPU.
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    mine = torch.compile(lambda x: x.softmax(dim=-1) * 2, fullgraph=True, backend=count)
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = mine(x)
    for kernel in (sdpa, mistakes.branch_over_data):
        check_attention(kernel, clauses=["compile"])
    assert torch.equal(mine(x), expected)
    assert len(graphs) == 1


def test_the_caller_s_setting_of_gradients_comes_back():
    check_attention(mistakes.detached_pattern, longest=2)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        check_attention(mistakes.branch_over_data, longest=2)
        assert not torch.is_grad_enabled()
