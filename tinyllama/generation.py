"""Prompt ids in, new ids out: prefill, decode steps, the rules for stopping, streams and batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tinyllama.cache import KVCache
from tinyllama.errors import InputError
from tinyllama.fast.graph import CompiledStep
from tinyllama.model import Llama
from tinyllama.sampler import Sampler
from tinyllama.speculation import Speculation

# Tokens of a prompt that go through the model at once: enough to keep the matrix units busy, few enough that
# the attention scores of a long prompt (T x S for every head) stay small.
PREFILL_CHUNK = 512


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_ids: Iterable[int] | None = None,
    speculate: int = 0,
    compiled: bool = False,
) -> list[list[int]]:
    """Continue every prompt; greedy unless a temperature is given.

    Args:
        model: the model.
        prompts: ids of each prompt; lengths may differ.
        max_new_tokens: at most this many for each; the context length is a limit too.
        temperature: see `Sampler`.
        top_k: see `Sampler`; transformers' `generate` has 50 by default.
        top_p: see `Sampler`.
        repetition_penalty: see `Sampler`.
        seed: see `Sampler`. One draw serves the whole batch, so a row's tokens depend on its companions.
        eos_ids: ids that end a text; None takes the checkpoint's, () lets every text run to its limit.
        speculate: for one prompt: guess up to this many ids from the text so far, and check them in one pass;
            0 is off. The ids are those without it, but for rounding: see `speculation`.
        compiled: take decode steps by `CompiledStep`, for long texts on a GPU; not with speculation.

    Returns:
        For each prompt its new ids, EOS included.

    Raises:
        InputError: a setting or a prompt cannot be used.
        NonFiniteLogitsError: the model gave NaN or infinite logits.
    """
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    ends = model.config.eos_ids if eos_ids is None else frozenset(eos_ids)
    speculation = _speculation(speculate, len(prompts), compiled)
    limits = [_limit(model, prompt, max_new_tokens) for prompt in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = {row for row, limit in enumerate(limits) if limit > 0}
    if not open_rows:
        return rows
    cache = model.new_cache(
        len(prompts), max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
    )
    for chosen in _steps(model, prompts, sampler, cache, speculation=speculation, compiled=compiled):
        for row in sorted(open_rows):
            rows[row].append(chosen[row])
            if chosen[row] in ends or len(rows[row]) == limits[row]:
                open_rows.remove(row)
        if not open_rows:
            break
    return rows


def stream(
    model: Llama,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_ids: Iterable[int] | None = None,
    speculate: int = 0,
    compiled: bool = False,
    cache: KVCache | None = None,
    cached: int = 0,
) -> TokenStream:
    """Continue one prompt, token by token: each id comes as soon as it is chosen.

    Args as in `generate`, and:
        cache: keys and values to use and extend, with room for the prompt and all new tokens; None makes one.
        cached: how many of the first ids it holds already, less than all.

    Raises:
        InputError: a setting, the prompt or the cache cannot be used; at once, not at the first token.
    """
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    ends = model.config.eos_ids if eos_ids is None else frozenset(eos_ids)
    speculation = _speculation(speculate, 1, compiled)
    limit = _limit(model, ids, max_new_tokens)
    cache = cache or model.new_cache(1, len(ids) + limit)
    if cache.capacity < len(ids) + limit:
        raise InputError(f"cache: expected room for {len(ids) + limit} tokens, got {cache.capacity}")
    if not 0 <= cached < len(ids):
        raise InputError(f"cached: expected 0 to {len(ids) - 1} of the prompt's ids, got {cached}")
    steps = _steps(model, [ids], sampler, cache, cached, speculation, compiled)
    return TokenStream(steps, limit, ends, speculation)


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
    model: Llama,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    cached: int = 0,
    chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """Put prompts into the cache and return the logits for each one's next token, (B, V).

    Args:
        model: the model.
        prompts: ids of each row. Shorter rows are padded on the left, so that all end in the last column;
            padding has position -1, which no query sees.
        cache: takes the keys and values.
        cached: how many leading columns it holds already; for rows of one length.
        chunk: columns that go through the model at once.
    """
    device = cache.keys.device
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)], device=device)
    columns = torch.arange(length, device=device) - torch.tensor(padding, device=device)[:, None]
    positions = columns.clamp(min=-1)  # (B, length)
    for start in range(cached, length, chunk):
        end = min(start + chunk, length)
        # Without positions the model knows that the mask is a plain triangle.
        given = None if start == 0 and not any(padding) else positions[:, start:end]
        hidden = model.hidden_states(ids[:, start:end], cache.upto(end), given, last=True)
    return model.lm_head(hidden[:, -1])


@torch.inference_mode()
def _steps(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    cache: KVCache,
    cached: int = 0,
    speculation: Speculation | None = None,
    compiled: bool = False,
) -> Iterator[list[int]]:
    """Each step's chosen id for every row, without end; rows that are done go on and are to be ignored."""
    device = cache.keys.device
    generator = sampler.generator(device)
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,), of the next token
    longest = max(map(len, prompts))
    seen = _seen(prompts, model.config.vocab_size, device)

    def choose(logits: Tensor) -> Tensor:  # (B, V) -> (B,)
        chosen = sampler.choose(logits, generator, seen)
        seen.scatter_(1, chosen[:, None], True)
        return chosen

    step = CompiledStep(model, cache) if compiled else None
    logits = prefill(model, prompts, cache, cached)
    if speculation:
        yield from speculation.steps(model, prompts[0], logits, choose, cache)
    while True:
        chosen = choose(logits)
        yield chosen.tolist()
        longest = min(longest + 1, cache.capacity)
        if step:
            logits = step(chosen[:, None], positions[:, None])[:, -1]
        else:
            # A single row ends with the cache's view; without positions the model knows that it sees all.
            given = positions[:, None] if len(prompts) > 1 else None
            logits = model(chosen[:, None], cache.upto(longest), given)[:, -1]
        # A row that is done may reach the end of the cache before the others.
        positions = (positions + 1).clamp(max=cache.capacity - 1)


def _speculation(most: int, prompts: int, compiled: bool) -> Speculation | None:
    if most == 0:
        return None
    if prompts > 1:
        raise InputError(f"speculate: expected 0 (off) or one prompt, got {prompts} prompts")
    if compiled:
        raise InputError("speculate: a compiled step has one token, speculation several; choose one of them")
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
    context = config.max_position_embeddings
    if len(prompt) >= context:
        raise InputError(f"prompt: {len(prompt)} tokens do not fit the context of {context}; shorten it")
    return min(max_new_tokens, context - len(prompt))
