"""The scorecard: everything that is measured of a change to attention, beside the unchanged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tinyllama.device import machine
from tinyllama.errors import InputError
from tinyllama.kernels import kernel_name
from tinyllama.lab.change import Change
from tinyllama.lab.clauses import CLAUSES
from tinyllama.lab.continuation import continuation, first_difference
from tinyllama.lab.contract import check_attention
from tinyllama.lab.effects import direct_changes, keys_needed, observe, total_changes
from tinyllama.lab.perplexity import perplexity
from tinyllama.lab.speed import speeds
from tinyllama.model import Llama
from tinyllama.parity.measure import Difference, difference
from tinyllama.text.tokenizer import Tokenizer

Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What changes are tried on.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        texts: ids by name: for perplexity, KL, top-1 and the changes inside.
        prompts: ids by name, to be continued.
    """

    model: Llama
    tokenizer: Tokenizer
    texts: Mapping[str, Sequence[int]]
    prompts: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        context: tokens of the prompt at which speed and KV memory are measured.
        rounds: of timing; 0 leaves it out.
        new_tokens: in each continuation.
    """

    context: int = 512
    rounds: int = 3
    new_tokens: int = 32


def scorecard(
    subject: Subject,
    changes: Sequence[Change],
    extent: Extent,
    done: Callable[[str], object] = lambda what: None,
) -> Figures:
    """Measure every change against the model as it is, in one plain dictionary.

    A change that breaks the contract unsaid is measured no further: the figures of a leak look too good.

    Args:
        subject: the model, which is as before afterwards, and what it reads.
        changes: what is tried.
        extent: how much is measured.
        done: told of each step.

    Raises:
        InputError: a change gives logits that are not finite.
    """
    config = subject.model.config
    cards = []
    for change in changes:
        done(f"{change.name}: contract")
        cards.append(_contract(subject.model, change))
    sound = [(change, card) for change, card in zip(changes, cards, strict=True) if card["passed"]]
    base: Figures = {}
    unchanged = Change("unchanged", subject.model.attentions[0].kernel, ())
    _predict(subject, sound, done)
    _read_keys(subject, sound, extent, done)
    _time(subject, [(unchanged, base), *sound], extent, done)
    _continue(subject, [(unchanged, base), *sound], extent, done)
    return {
        "machine": machine(),
        "model": {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "dtype": str(subject.model.embed_tokens.weight.dtype).removeprefix("torch."),
            "kernels": sorted({kernel_name(attention.kernel) for attention in subject.model.attentions}),
        },
        "texts": {name: len(ids) for name, ids in subject.texts.items()},
        "extent": asdict(extent),
        "unchanged": base,
        "changes": cards,
    }


Cards = Sequence[tuple[Change, Figures]]


def _contract(model: Llama, change: Change) -> Figures:
    config = model.config
    shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    contract = check_attention(change.kernel, *shape, layer=min(change.layers or (0,)))
    return {
        "name": change.name,
        "layers": list(range(config.num_hidden_layers) if change.layers is None else change.layers),
        "heads": list(range(config.num_attention_heads) if change.heads is None else change.heads),
        "passed": contract.passed,
        "contract": [
            {"clause": clause.name, "verdict": clause.verdict, "says": CLAUSES[clause.name]}
            | {"example": clause.example}
            for clause in contract.clauses
        ],
    }


def _predict(subject: Subject, cards: Cards, done: Callable[[str], object]) -> None:
    """Perplexity, KL and top-1 by text, and what moved inside."""
    model, changes = subject.model, [change for change, _ in cards]
    parts: list[dict[str, Difference]] = [{} for _ in cards]
    moved: list[dict[str, tuple[Tensor, ...]]] = [{} for _ in cards]
    for text, ids in subject.texts.items():
        done(f"{text}, the unchanged model")
        logits, before = observe(model, ids)
        truth = logits.double()
        direct = direct_changes(model, changes, ids)
        for n, change in enumerate(changes):
            done(f"{text}, {change.name}")
            with change.applied(model):
                logits, values = observe(model, ids)
            if not logits.isfinite().all():
                raise InputError(
                    f"{change.name}: gives logits on {text} that are not finite; leave it out, or use float32"
                )
            parts[n][text] = difference(logits, truth, ids)
            moved[n][text] = (*total_changes(values, before), direct[n])
    for (_, card), part, move in zip(cards, parts, moved, strict=True):
        card["texts"] = [{"text": text, **_prediction([measured])} for text, measured in part.items()]
        card["all"] = _prediction(list(part.values()))
        for n, name in enumerate(("layers_changed", "heads_changed", "heads_direct")):
            card[name] = _mean({text: values[n] for text, values in move.items()}, subject.texts)


def _prediction(parts: list[Difference]) -> Figures:
    whole = Difference.joined(parts)
    return {
        "tokens": len(whole.nll),
        **asdict(perplexity([part.nll for part in parts], [part.truth_nll for part in parts])),
        "kl_mean": whole.kl_mean,
        "kl_max": whole.kl_max,
        "top1": whole.top1,
    }


def _mean(values: Mapping[str, Tensor], texts: Mapping[str, Sequence[int]]) -> Any:
    """That of all tokens of all texts, as lists."""
    total = sum(len(texts[text]) * value for text, value in values.items())
    return (total / sum(map(len, texts.values()))).tolist()  # type: ignore[union-attr]


def _longest(subject: Subject) -> Sequence[int]:
    return max(subject.texts.values(), key=len)


def _read_keys(subject: Subject, cards: Cards, extent: Extent, done: Callable[[str], object]) -> None:
    ids = _longest(subject)[: 2 * extent.context]
    for change, card in cards:
        done(f"keys needed, {change.name}")
        with change.applied(subject.model):
            card["keys"] = {"of": len(ids) // 2, "needed": keys_needed(subject.model, ids)}


def _time(subject: Subject, cards: Cards, extent: Extent, done: Callable[[str], object]) -> None:
    if not extent.rounds:
        return
    done(f"speed, {extent.rounds} rounds")
    ids = _longest(subject)[: extent.context]
    measured = speeds(subject.model, [change for change, _ in cards], ids, extent.rounds)
    first = measured[0]
    for (_, card), speed in zip(cards, measured, strict=True):
        card["speed"] = {
            "context": len(ids),
            "prefill": speed.prefill,
            "decode": speed.decode,
            "prefill_ratio": speed.prefill / first.prefill,
            "decode_ratio": speed.decode / first.decode if speed.decode and first.decode else None,
        }


def _continue(subject: Subject, cards: Cards, extent: Extent, done: Callable[[str], object]) -> None:
    tokenizer = subject.tokenizer
    own: dict[str, list[int]] = {}
    for change, card in cards:
        done(f"continuations, {change.name}")
        card["continuations"] = []
        for name, prompt in subject.prompts.items():
            with change.applied(subject.model):
                ids = continuation(subject.model, prompt, extent.new_tokens)
            parts_at = first_difference(ids, own.setdefault(name, ids))
            # Decoded with the prompt, which decides about the first space.
            start = len(tokenizer.decode(list(prompt)))
            whole = same = tokenizer.decode([*prompt, *ids])[start:]
            if parts_at is not None:  # a character cut in two is not the same yet
                same = tokenizer.decode([*prompt, *ids[:parts_at]])[start:].rstrip("\ufffd")
            card["continuations"].append(
                {"prompt": name, "ids": ids, "parts_at": parts_at, "same": same, "rest": whole[len(same) :]}
            )
