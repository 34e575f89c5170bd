"""The ten steps: with what each function is tried, on a tiny model whose random weights hide no mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.config import LlamaConfig
from tinyllama.learn import mistakes
from tinyllama.parity import attention_mistakes
from tinyllama.parity import mistakes as known
from tinyllama.parity.fixture import fixture
from tinyllama.parity.oracle import oracle_logits
from tinyllama.parity.scene import Scene, Suspects

IDS = (7, 301, 19, 7, 250, 88)  # short, so that loops over single numbers take a second at most
CALLS = (4, 1, 1)  # how decoding cuts them


@dataclass(frozen=True)
class Case:
    """One call of a learner's function.

    Attributes:
        says: what is special about it.
        arguments: in their order.
        formulas: from what came out, in float64: the right value under the name "", then mistakes.
        shapes: mistakes that give another shape.
    """

    says: str
    arguments: tuple[Any, ...]
    formulas: Callable[[Tensor], Suspects]
    shapes: Callable[[], Suspects] | None = None

    @property
    def expected(self) -> Tensor:
        """The right value."""
        return right(self.formulas(torch.zeros(())))


def right(suspects: Suspects) -> Tensor:
    """The first of them, which is the right value; the others are not computed."""
    return next(suspects)[1]


def wrong(suspects: Suspects) -> Suspects:
    """Those after the first, which is the right value."""
    return islice(suspects, 1, None)


@dataclass(frozen=True)
class Lesson:
    """The tiny model, and the true values for one text.

    Attributes:
        config: its shape.
        weights: float32.
        true: the oracle's values by address, in float64.
    """

    config: LlamaConfig
    weights: dict[str, Tensor]
    true: dict[str, Tensor]

    def scene(self, address: str, observed: Tensor, **seen: Tensor) -> Scene:
        """What parity needs to name a mistake; `seen` are values of the layer, with __ for a dot."""
        names = {name.replace("__", "."): value.double() for name, value in seen.items()}
        at = ".".join(address.split(".")[:2])
        values = {name if name == "input" else f"{at}.{name}": value for name, value in names.items()}
        return Scene(address, values | {address: observed}, asdict(self.config), self.weights, IDS)

    def input(self, address: str) -> Tensor:
        """A true value in float32, as a function is given it."""
        return self.true[address].float()

    def double(self) -> dict[str, Tensor]:
        """The weights in float64."""
        return {name: weight.double() for name, weight in self.weights.items()}


@cache
@torch.no_grad()
def lesson() -> Lesson:
    """The model and the oracle's values."""
    # C = H*D, but no two of the ways to scale the scores are the same number.
    model = fixture(num_attention_heads=4, head_dim=16)
    addresses = ["layers.0", "layers.3"]
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj"):
        addresses.append(f"layers.1.{name}")
    for name in (
        "self_attn.v_proj",
        "self_attn.q_rot",
        "self_attn.k_rot",
        "self_attn.o_proj",
        "mlp.down_proj",
    ):
        addresses.append(f"layers.1.{name}")
    trace: dict[str, Tensor | None] = dict.fromkeys(addresses)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    oracle_logits(asdict(model.config), weights, IDS, trace)
    return Lesson(model.config, weights, {name: value for name, value in trace.items() if value is not None})


def cases(step: str) -> list[Case]:
    """With what the function of that name is tried."""
    return CASES[step]()


def _embedding() -> list[Case]:
    one = lesson()
    table, ids = one.weights["embed_tokens.weight"], torch.tensor(IDS)

    def shapes() -> Suspects:
        yield (
            "one-hot vectors are returned, not yet multiplied with the table",
            F.one_hot(ids, len(table)).double(),
        )
        yield "columns are taken for rows", table.double().T[ids.clamp(max=table.shape[1] - 1)]
        yield "all vectors are added up", table[ids].double().sum(0)

    def formulas(observed: Tensor) -> Suspects:
        yield from known.embedding(one.scene("embed_tokens", observed))
        yield "the place of a token is looked up, not its id", table[torch.arange(len(ids))].double()
        yield "ids are counted from 1: the row before is taken", table[ids - 1].double()
        yield "vectors are normalised", F.normalize(table[ids].double(), dim=-1)

    return [Case("six tokens, one of them twice", (ids, table), formulas, shapes)]


def _rms_norm() -> list[Case]:
    one, found = lesson(), []
    for says, address, at in (
        ("large numbers", "norm", "layers.3"),
        ("numbers of the size of eps", "layers.0.input_layernorm", "embed_tokens"),
    ):
        x = one.weights["embed_tokens.weight"][list(IDS)] if at == "embed_tokens" else one.input(at)
        weight, eps = one.weights[f"{address}.weight"], one.config.rms_norm_eps

        def formulas(observed: Tensor, address: str = address, x: Tensor = x, w: Tensor = weight) -> Suspects:
            known_ones = known.norm(one.scene(address, observed, input=x))
            return chain(known_ones, mistakes.norm(x.double(), w.double(), one.config.rms_norm_eps))

        found.append(Case(says, (x, weight, eps), formulas))
    return found


def _frequencies() -> list[Case]:
    def shapes(D: int, theta: float) -> Suspects:
        for name, value in mistakes.frequencies(D, theta):
            what = f"{name}, and each" if name else "each"
            yield f"{what} pair's frequency stands there twice", torch.cat((value, value))
            yield f"{what} pair's frequency stands there twice", value.repeat_interleave(2)
        yield "one too many: the last pair is D/2 - 1", theta ** (-2 * torch.arange(D // 2 + 1).double() / D)

    return [
        Case(
            f"D = {D}, theta = {theta:g}",
            (D, theta),
            lambda observed, D=D, theta=theta: mistakes.frequencies(D, theta),  # type: ignore[misc]
            lambda D=D, theta=theta: shapes(D, theta),  # type: ignore[misc]
        )
        for D, theta in ((64, 10000.0), (16, 500000.0))
    ]


def _rope() -> list[Case]:
    one, D = lesson(), lesson().config.head_dim
    q = one.input("layers.1.self_attn.q_proj").unflatten(-1, (-1, D)).transpose(0, 1).contiguous()
    speeds = right(mistakes.frequencies(D, one.config.rope_theta))
    here, later = torch.arange(len(IDS)), torch.arange(len(IDS)) + 7
    speed = speeds.float()

    def formulas(observed: Tensor) -> Suspects:
        address = "layers.1.self_attn.q_rot"
        scene = one.scene(address, observed, self_attn__q_proj=one.input("layers.1.self_attn.q_proj"))
        return attention_mistakes.rope(scene)

    def going_on(observed: Tensor) -> Suspects:
        return mistakes.rope(q.double(), later, speed.double())

    def shapes() -> Suspects:
        turned = mistakes.ours.rope(q.double(), here, speeds)
        yield "the first number of each pair alone is returned", turned[..., : D // 2]
        yield "the second number of each pair alone is returned", turned[..., D // 2 :]

    return [
        Case("positions 0 to 5", (q, here, speed), formulas, shapes),
        Case("positions 7 to 12", (q, later, speed), going_on, shapes),
    ]


def _attention() -> list[Case]:
    one, D = lesson(), lesson().config.head_dim
    q, k = one.input("layers.1.self_attn.q_rot"), one.input("layers.1.self_attn.k_rot")
    v = one.input("layers.1.self_attn.v_proj").unflatten(-1, (-1, D)).transpose(0, 1).contiguous()

    def formulas(observed: Tensor) -> Suspects:
        scene = one.scene(
            "layers.1.self_attn.z",
            observed,
            self_attn__q_rot=q,
            self_attn__k_rot=k,
            self_attn__v_proj=one.input("layers.1.self_attn.v_proj"),
        )
        return chain(
            attention_mistakes.attended(scene), wrong(mistakes.attention(q.double(), k.double(), v.double()))
        )

    def going_on(observed: Tensor) -> Suspects:
        return mistakes.attention(q[:, -2:].double(), k.double(), v.double())

    def shapes() -> Suspects:
        z = right(formulas(torch.zeros(())))
        yield "heads are merged already: (T, H*D)", z.transpose(0, 1).flatten(1)
        yield "heads and tokens are exchanged: (T, H, D)", z.transpose(0, 1)
        identity = torch.eye(q.shape[1]).double().expand(len(k), -1, -1)
        pattern = right(mistakes.attention(q.double(), k.double(), identity))
        yield "the pattern is returned, not yet multiplied with the values", pattern

    return [
        Case("six tokens", (q, k, v), formulas, shapes),
        Case("two new tokens after four cached ones", (q[:, -2:].contiguous(), k, v), going_on),
    ]


def _swiglu() -> list[Case]:
    one = lesson()
    x, at = one.input("layers.1.post_attention_layernorm"), "layers.1.mlp."
    gate, up, down = (one.weights[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
    wide = {"mlp__gate_proj": x.double() @ gate.double().T, "mlp__up_proj": x.double() @ up.double().T}
    scene = one.scene(f"{at}product", torch.zeros(()), **wide)

    def shapes() -> Suspects:
        for name, value in known.product(scene):
            yield f"down is left out{name and ', and '}{name}", value

    def formulas(observed: Tensor) -> Suspects:
        return mistakes.swiglu(known.product(scene), down.double())

    return [Case("six tokens", (x, gate, up, down), formulas, shapes)]


def _block() -> list[Case]:
    one, x = lesson(), lesson().input("layers.0")
    w = mistakes.sub(one.weights, "layers.1.")
    double = mistakes.sub(one.double(), "layers.1.")
    here = torch.arange(len(IDS))
    D = one.config.head_dim
    past = one.input("layers.1.self_attn.k_rot"), one.input("layers.1.self_attn.v_proj")
    past = past[0], past[1].unflatten(-1, (-1, D)).transpose(0, 1).contiguous()

    def alone(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def after(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((past[0].to(k.dtype), k), dim=1), torch.cat((past[1].to(v.dtype), v), dim=1)

    def formulas(observed: Tensor) -> Suspects:
        attended, mlp = (one.true[f"layers.1.{name}"] for name in ("self_attn.o_proj", "mlp.down_proj"))
        seen = {"input": x, "self_attn__o_proj": attended, "mlp__down_proj": mlp}
        nothing = tuple(t[:, :0].double() for t in past)
        more = mistakes.block(x.double(), double, one.config, here, nothing)  # type: ignore[arg-type]
        return chain(known.block(one.scene("layers.1", observed, **seen)), wrong(more))

    def going_on(observed: Tensor) -> Suspects:
        before = past[0].double(), past[1].double()
        return mistakes.block(x[:2].double(), double, one.config, here[:2] + len(IDS), before)

    return [
        Case("six tokens", (x, w, one.config, here, alone), formulas),
        Case("two tokens after six", (x[:2], w, one.config, here[:2] + len(IDS), after), going_on),
    ]


def _llama() -> list[Case]:
    one, ids = lesson(), torch.tensor(IDS)

    def formulas(observed: Tensor) -> Suspects:
        return mistakes.llama(ids, one.double(), one.config)

    def shapes() -> Suspects:
        logits = right(formulas(torch.zeros(())))
        yield "the logits of the last token alone are returned", logits[-1]
        yield "the logits of the last token alone are returned", logits[-1:]
        for name, value in zip(("", " before the norm"), _streams(one, ids), strict=True):
            yield f"the stream{name} is returned: the head is left out", value

    return [Case("six tokens", (ids, one.weights, one.config), formulas, shapes)]


def _streams(one: Lesson, ids: Tensor) -> Iterator[Tensor]:
    weights = one.double() | {"identity": torch.eye(one.config.hidden_size).double()}
    for normed in (True, False):
        yield mistakes.whole(ids, weights, one.config, head="identity", normed=normed)


def _decode() -> list[Case]:
    one, calls = lesson(), torch.tensor(IDS).split(CALLS)

    def shapes() -> Suspects:
        logits = right(formulas(torch.zeros(())))
        ends = [sum(CALLS[: n + 1]) - 1 for n in range(len(CALLS))]
        yield "the logits of the last token of each call alone are returned", logits[ends]

    def formulas(observed: Tensor) -> Suspects:
        return mistakes.decode(calls, one.double(), one.config)

    return [Case("four tokens, then one, then one", (calls, one.weights, one.config), formulas, shapes)]


CASES: dict[str, Callable[[], list[Case]]] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "frequencies": _frequencies,
    "rope": _rope,
    "attention": _attention,
    "swiglu": _swiglu,
    "block": _block,
    "llama": _llama,
    "decode": _decode,
}
