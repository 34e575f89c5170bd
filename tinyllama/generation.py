"""Prompt ids in, new ids out: prefill, decode steps, the rules for stopping, streams and batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tinyllama import advice
from tinyllama.cache import KVCache
from tinyllama.errors import InputError
from tinyllama.model import Llama
from tinyllama.sampler import Sampler
from tinyllama.speculation import Speculation

# Tokens of a prompt that go through the model at once: enough to keep the matrix units busy, few enough that
# the attention scores of a long prompt (T x S for every head) stay small.
PREFILL_CHUNK = 512

SETTINGS = ("max_new_tokens", "eos_ids", "speculate", *(field.name for field in fields(Sampler)))


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    eos_ids: Iterable[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    speculate: int = 0,
    **sampling: Any,
) -> list[list[int]]:
    """Continue every prompt; greedy unless a temperature is given.

    Args:
        model: the model.
        prompts: ids of each prompt; lengths may differ.
        max_new_tokens: at most this many for each; the context length is a limit too.
        eos_ids: ids that end a text; None takes the checkpoint's, () lets every text run to its limit.
        stop: is asked after each id, with the new ids of its text so far; True ends that text too.
        speculate: for one prompt: guess up to this many ids from the text so far, and check them in one pass;
            0 is off. The ids stay the same but for rounding: see `speculation`.
        sampling: `temperature`, `top_k`, `top_p`, `repetition_penalty` and `seed`, as in `Sampler`. One draw
            serves the whole batch, so a row's tokens depend on the other rows.

    Returns:
        For each prompt its new ids, EOS included.

    Raises:
        InputError: a setting or a prompt cannot be used.
        NonFiniteLogitsError: the model gave NaN or infinite logits.
    """
    advice.check_prompts(prompts)
    advice.check_settings(sampling, (*SETTINGS, "stop"))
    ends = model.config.eos_ids if eos_ids is None else frozenset(eos_ids)
    limits = [_limit(model, prompt, max_new_tokens) for prompt in prompts]
    speculation = _speculation(speculate, prompts, model)
    sampler = Sampler(**sampling)
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = {row for row, limit in enumerate(limits) if limit > 0}
    if not open_rows:
        return rows
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    steps = _steps(model, prompts, sampler, model.new_cache(len(prompts), capacity), speculation)
    for chosen in model.supervise(steps):
        for row in sorted(open_rows):
            rows[row].append(chosen[row])
            stopped = stop is not None and stop(rows[row])
            if stopped or chosen[row] in ends or len(rows[row]) == limits[row]:
                open_rows.remove(row)
        if not open_rows:
            break
    return rows


def stream(
    model: Llama,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    eos_ids: Iterable[int] | None = None,
    speculate: int = 0,
    cache: KVCache | None = None,
    **sampling: Any,
) -> TokenStream:
    """Continue one prompt, token by token: each id comes as soon as it is chosen.

    The arguments are those of `generate`, and:
        cache: keys and values to use and extend, with room for the prompt and all new tokens; it holds the
            first `cache.length` ids of the prompt already. None makes one.

    Raises:
        InputError: a setting, the prompt or the cache cannot be used; at once, not at the first token.
    """
    advice.check_prompt(ids)
    advice.check_settings(sampling, SETTINGS)
    ends = model.config.eos_ids if eos_ids is None else frozenset(eos_ids)
    limit = _limit(model, ids, max_new_tokens)
    speculation = _speculation(speculate, [ids], model)
    cache = cache or model.new_cache(1, len(ids) + limit)
    if cache.capacity < len(ids) + limit:
        raise InputError(f"cache: expected room for {len(ids) + limit} tokens, got {cache.capacity}")
    if cache.length >= len(ids):
        raise InputError(
            f"cache.length: expected less than the prompt's {len(ids)} ids, got {cache.length}; set it to "
            "how many of them the cache holds"
        )
    steps = _steps(model, [ids], Sampler(**sampling), cache, speculation)
    return TokenStream(model.supervise(steps), limit, ends, speculation)


class TokenStream(Iterator[int]):
    """Ids as they are chosen; leave the loop at any time.

    Attributes:
        reason: why it ended: "eos", or "length" (max_new_tokens or the context is full); None before the end.
        seconds: what each id took; the first includes the prefill. A pass counts for the first id it gives.
        speculation: how guessing goes; None if it is off.
    """

    def __init__(
        self,
        steps: Iterator[list[int]],
        limit: int,
        eos_ids: frozenset[int],
        speculation: Speculation | None = None,
    ) -> None:
        self.reason: str | None = None
        self.seconds: list[float] = []
        self.speculation = speculation
        self._steps, self._left, self._eos_ids = steps, limit, eos_ids

    def __next__(self) -> int:
        """The next id."""
        if self._left == 0:
            self.reason = self.reason or "length"
            raise StopIteration
        start = time.perf_counter()
        (token,) = next(self._steps)
        self.seconds.append(time.perf_counter() - start)
        self._left -= 1
        if token in self._eos_ids:
            self.reason, self._left = "eos", 0
        return token


@torch.inference_mode()
def prefill(
    model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache, chunk: int = PREFILL_CHUNK
) -> Tensor:
    """Put prompts into the cache and return the logits for each one's next token, (B, V).

    Args:
        model: the model.
        prompts: ids of each row. Shorter rows are padded on the left, so that all end in the last column;
            padding has position -1, which no query sees.
        cache: takes the keys and values; of prompts of one length it may hold the first `cache.length` ids.
        chunk: columns that go through the model at once.
    """
    ids, positions = left_padded(prompts, cache.keys.device)
    length, held = ids.shape[1], cache.length
    for start in range(held, length, chunk):
        end = min(start + chunk, length)
        if positions is not None:
            hidden = model.hidden_states(ids[:, start:end], cache.first(end), positions[:, start:end])
        else:
            hidden = model.hidden_states(ids[:, start:end], cache)
    # The logits of the last position alone: V is large.
    return model.lm_head(hidden[:, -1:])[:, -1]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Texts as one tensor of ids, (B, T), and their positions, (B, T), -1 for the padding on the left.

    The positions are None if all texts have the same length: then a model needs none.
    """
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(padding, rows, strict=True)], device=device)
    if not any(padding):
        return ids, None
    columns = torch.arange(length, device=device) - torch.tensor(padding, device=device)[:, None]
    return ids, columns.clamp(min=-1)


@torch.inference_mode()
def _steps(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    cache: KVCache,
    speculation: Speculation | None,
) -> Iterator[list[int]]:
    """Each step's chosen id for every row, without end; rows that are done go on and are to be ignored."""
    device = cache.keys.device
    generator = sampler.generator(device)
    seen = _seen(prompts, model.config.vocab_size, device)

    def choose(logits: Tensor) -> Tensor:  # (B, V) -> (B,)
        chosen = model.agree(sampler.choose(logits, generator, seen))
        seen.scatter_(1, chosen[:, None], True)
        return chosen

    logits = prefill(model, prompts, cache)
    if speculation:
        yield from speculation.steps(model, prompts[0], logits, choose, cache)
    lengths = [len(prompt) for prompt in prompts]
    longest, ragged = max(lengths), len(set(lengths)) > 1
    positions = torch.tensor(lengths, device=device)[:, None]  # (B, 1), of the next token
    while True:
        chosen = choose(logits)
        yield chosen.tolist()
        longest = min(longest + 1, cache.capacity)
        if model.step is not None:
            logits = model.step(chosen[:, None], cache, positions)[:, -1]
        elif ragged:
            logits = model(chosen[:, None], cache.first(longest), positions)[:, -1]
        else:
            logits = model(chosen[:, None], cache)[:, -1]
        # A row that is done may reach the end of the cache before the others.
        positions = (positions + 1).clamp(max=cache.capacity - 1)


def _speculation(most: int, prompts: Sequence[Sequence[int]], model: Llama) -> Speculation | None:
    if most == 0:
        return None
    if len(prompts) > 1:
        raise InputError(f"speculate: expected 0 (off) or one prompt, got {len(prompts)} prompts")
    if model.step is not None:
        raise InputError("speculate: a recorded step has one token, speculation several; choose one of them")
    return Speculation(most)


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen.to(device)


def _limit(model: Llama, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens may follow the prompt."""
    config = model.config
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
    if len(prompt) == 0:
        raise InputError("prompt: expected at least one id (BOS stands for an empty text), got none")
    if not all(0 <= id < config.vocab_size for id in prompt):
        raise InputError(
            f"prompt: expected ids from 0 to {config.vocab_size - 1}, got {min(prompt)} to {max(prompt)}"
        )
    context = config.context
    if len(prompt) >= context:
        raise InputError(f"prompt: {len(prompt)} tokens do not fit the context of {context}; shorten it")
    return min(max_new_tokens, context - len(prompt))
