"""A conversation of many turns that computes each token once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tinyllama.errors import InputError
from tinyllama.generation import stream
from tinyllama.model import Llama
from tinyllama.speculation import Speculation
from tinyllama.text.chat import Message
from tinyllama.text.reply import TextReply
from tinyllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """What one reply took.

    Attributes:
        prompt: tokens of the conversation up to the reply.
        cached: how many of those were in the cache already and were not computed again.
        new: tokens of the reply.
        seconds: what each of them took; the first includes the prefill.
        reason: why the reply ended, as in `TextReply`; None if it was interrupted.
        speculation: how guessing went; None if it was off.
    """

    prompt: int
    cached: int
    new: int
    seconds: list[float]
    reason: str | None
    speculation: Speculation | None


class Conversation:
    """Messages, and the KV cache that holds them, kept from turn to turn.

    Each turn renders all messages anew by the model's chat template. As far as the new ids begin like those
    in the cache, their keys and values are there: a token's depend on the tokens before it alone. Only the
    rest goes through the model. Changing an old message is safe: the common prefix is then shorter.

    Attributes:
        messages: dicts with `role` and `content`, as in `Tokenizer.chat`; may be changed between turns.
        last: the latest turn, None before the first.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, messages: Sequence[Message] = (), *, strict: bool = False
    ) -> None:
        self.messages = list(messages)
        self.last: Turn | None = None
        self._model, self._tokenizer, self._strict = model, tokenizer, strict
        self._cache = model.new_cache(1, 0)
        self._cached_ids: list[int] = []

    def ask(
        self,
        text: str,
        show: Callable[[str], object],
        *,
        max_new_tokens: int = 256,
        **settings: Any,
    ) -> str:
        """Send a message and return the reply.

        Whatever ends a reply early (Ctrl-C, an exception of `show`), what was said until then is kept as the
        reply, and the next turn goes on from there. If nothing was said, the message is taken back too.

        Args:
            text: the user's message.
            show: is called with each piece of the reply as it comes.
            max_new_tokens: at most this many; the context length is a limit too.
            settings: how tokens are chosen, as in `stream`.

        Raises:
            InputError: the message cannot be used, or the conversation has filled the context.
            NonFiniteLogitsError: the model gave NaN or infinite logits.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.chat(messages, strict=self._strict)
        context = self._model.config.max_position_embeddings
        if len(ids) >= context:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the context {context}; start a new one (/reset)"
            )
        # The last token is computed in any case: its logits choose the next.
        cached = min(common_prefix(ids, self._cached_ids), len(ids) - 1)
        self._reserve(min(len(ids) + max_new_tokens, context))
        tokens = stream(
            self._model, ids, max_new_tokens=max_new_tokens, cache=self._cache, cached=cached, **settings
        )
        reply = TextReply(tokens, self._tokenizer, ids)
        self._cached_ids = ids[:cached]  # an interrupted prefill leaves anything after these
        said = ""
        try:
            for piece in reply:
                said += piece
                show(piece)
        finally:
            if reply.ids:
                # The newest id has been chosen, but has not been through the model.
                self._cached_ids = ids + reply.ids[:-1]
            if said or reply.reason:
                self.messages = [*messages, {"role": "assistant", "content": said}]
            self.last = Turn(
                len(ids), cached, len(reply.ids), tokens.seconds, reply.reason, tokens.speculation
            )
        return said

    def _reserve(self, length: int) -> None:
        """Make room for `length` tokens; doubling, so that a long conversation is copied a few times only."""
        old = self._cache
        if old.capacity < length:
            context = self._model.config.max_position_embeddings
            self._cache = self._model.new_cache(1, min(max(length, 2 * old.capacity), context))
            self._cache.keys[..., : old.capacity, :] = old.keys[..., : old.capacity, :]
            self._cache.values[..., : old.capacity, :] = old.values[..., : old.capacity, :]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
