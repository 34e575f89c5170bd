"""A conversation of many turns that computes each token once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

from tinyllama.checkpoints.files import replace_text
from tinyllama.errors import InputError
from tinyllama.generation import stream
from tinyllama.model import Llama
from tinyllama.speculation import Speculation
from tinyllama.text.messages import Message
from tinyllama.text.reply import TextReply
from tinyllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """What one reply took.

    Attributes:
        prompt: tokens of the conversation up to the reply.
        cached: how many of those were in the cache already and were not computed again.
        new: tokens of the reply.
        seconds: time for each token of the reply; the first includes the prefill.
        reason: why the reply ended, as in `TextReply`; None if it was interrupted.
        speculation: counts of guessed tokens; None if speculation was off.
    """

    prompt: int
    cached: int
    new: int
    seconds: list[float]
    reason: str | None
    speculation: Speculation | None


class Conversation:
    """Messages, and the KV cache that holds their tokens from turn to turn.

    Each turn renders all messages by the model's chat template and compares the ids with those in the cache.
    The keys and values of the common prefix are right, since a token's depend only on the tokens before it;
    the rest goes through the model. So old messages may be changed: the common prefix is then shorter.

    Attributes:
        messages: dicts with `role` and `content`, as in `Tokenizer.chat`; may be changed between turns.
        last: the latest turn, None before the first.
        context: the model's context length in tokens.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, messages: Sequence[Message] = (), *, strict: bool = False
    ) -> None:
        self.messages = list(messages)
        self.last: Turn | None = None
        self.context = model.config.context
        self._model, self._tokenizer, self._strict = model, tokenizer, strict
        self._cache = model.new_cache(1, 0)
        self._cached_ids: list[int] = []

    def ask(
        self, text: str, show: Callable[[str], object], *, max_new_tokens: int = 256, **settings: Any
    ) -> str:
        """Send a message and return the reply.

        If a reply ends early (Ctrl-C, an exception from `show`), what was said so far is kept as the reply,
        and the next turn continues from there. If nothing was said, the message is not kept either.

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
        if len(ids) >= self.context:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the context {self.context}; start over (/reset)"
            )
        common = sum(takewhile(bool, map(eq, ids, self._cached_ids)))
        cached = min(common, len(ids) - 1)  # the last token is always computed: its logits choose the next
        self._reserve(min(len(ids) + max_new_tokens, self.context))
        self._cache.length = cached
        tokens = stream(self._model, ids, max_new_tokens=max_new_tokens, cache=self._cache, **settings)
        reply = TextReply(tokens, self._tokenizer, ids)
        self._cached_ids = ids[:cached]  # an interrupted prefill may have overwritten what follows
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

    def undo(self) -> str:
        """Forget the last message of the user and what followed it, and return its text.

        The cache keeps its tokens: the next turn goes on from what is still the same.

        Raises:
            InputError: the user has said nothing yet.
        """
        users = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise InputError("there is nothing to undo: no message has been answered yet")
        text = self.messages[users[-1]]["content"]
        self.messages = self.messages[: users[-1]]
        return text

    def save(self, path: Path) -> None:
        """Write the messages as JSON, replacing an old file only by the complete new one."""
        replace_text(path, json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Continue with the messages that `save` wrote; the next turn computes their tokens.

        Raises:
            InputError: the file cannot be read, or holds no messages.
        """
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; give a saved file") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not readable as JSON ({error}); give a saved file") from error
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InputError(f"{path}: expected a list of objects with role and content; give a saved file")
        self.messages = messages

    def _reserve(self, length: int) -> None:
        """Make room for `length` tokens; at least double it, so that a long conversation is copied rarely."""
        old = self._cache
        if old.capacity < length:
            self._cache = self._model.new_cache(1, min(max(length, 2 * old.capacity), self.context))
            self._cache.keys[..., : 1 + old.capacity, :] = old.keys
            self._cache.values[..., : 1 + old.capacity, :] = old.values


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
