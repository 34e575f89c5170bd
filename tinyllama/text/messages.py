"""Chat messages: their checks, before a template sees them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tinyllama.errors import InputError
from tinyllama.text.special_tokens import SpecialTokens, check_text

# Role markers as templates spell them where they are not special tokens: <|user|>, [INST], <<SYS>>.
ROLE_MARKER = re.compile(r"<\|[^|<>{}'\"\s]+\|>|\[/?[A-Z_]+\]|<</?[A-Z_]+>>")

Message = dict[str, Any]


class RoleMarkerWarning(UserWarning):
    """A message contains a role marker of the template, so the model may read it as a turn of its own."""


def plain_messages(messages: Sequence[Message], special: SpecialTokens) -> list[Message]:
    """A checked copy of the messages in JSON types, so that they hold nothing a template could call."""
    if not isinstance(messages, (list, tuple)):
        raise InputError(
            f"chat: expected a list of messages, got {type(messages).__name__}; pass a list of dicts"
        )
    if not messages:
        raise InputError("chat: no messages; give at least one with a role and a content")
    try:
        copies: list[Message] = json.loads(json.dumps(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"chat: messages must be plain data ({error}); use strings, lists and dicts"
        ) from error
    for index, message in enumerate(copies):
        check_message(message, f"chat: message {index}", special)
    return copies


def check_message(message: Message, where: str, special: SpecialTokens) -> None:
    """Raise InputError for a message without role or text, or with a special token outside the content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: expected a dict with 'role' and 'content', got {message!r:.80}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if isinstance(content, dict) or (content is None and message.get("tool_calls")):
        parts = []  # data for the template, without a user's text
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"{where}: expected 'content' to be a string or a list of {{'type': 'text', 'text': ...}}, "
                f"got {content!r:.80}"
            )
        check_text(part["text"], where)
    (rest,) = map_contents([message], lambda text: "")
    spelled = json.dumps(rest, ensure_ascii=False)
    check_text(spelled, where)
    for token in special.control:
        # Templates compare these values with constants, so they cannot be masked.
        if json.dumps(token, ensure_ascii=False)[1:-1] in spelled:
            raise InputError(f"{where}: special token {token!r} outside the content; remove it there")


def check_role_markers(template: str, messages: list[Message], special: SpecialTokens, strict: bool) -> None:
    """Warn of role markers in a message, or refuse them: they are text, so no id tells who wrote them."""
    markers = sorted(set(ROLE_MARKER.findall(template)).difference(special.control))
    for index, message in enumerate(messages):
        content = message.get("content")
        text = "".join(part["text"] for part in content) if isinstance(content, list) else str(content)
        for marker in markers:
            if marker in text:
                problem = (
                    f"chat: message {index} contains {marker!r}, which the model reads as the start of a turn"
                )
                if strict:
                    raise InputError(f"{problem}; remove it")
                warnings.warn(problem, RoleMarkerWarning, stacklevel=5)  # the caller of Tokenizer.chat


def map_contents(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    """The messages with every text in their contents changed; data of a tool stay as they are."""

    def changed(content: Any) -> Any:
        if isinstance(content, str):
            return change(content)
        if isinstance(content, list):
            return [{**part, "text": change(part["text"])} for part in content]
        return content

    return [
        {key: changed(value) if key == "content" else value for key, value in message.items()}
        for message in messages
    ]
