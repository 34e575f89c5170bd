"""Chat messages -> the segments of a prompt, by the checkpoint's own template.

The template is code from a download, so it runs in jinja2's sandbox, in a process of its own. The messages
are text from a user, so a special token typed there stays text: a message cannot end a turn or begin one.

A rendered template is one string, in which a typed "</s>" looks like the template's own. So the template is
rendered with the characters of typed special tokens replaced by private-use ones (masks), the result is split
at the special tokens that are left, and the masks are replaced back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial

from tinyllama.text.messages import Message, check_role_markers, map_contents, plain_messages
from tinyllama.text.special_tokens import Segment, SpecialTokens
from tinyllama.text.template import render

MASKS = range(0x10FFFD, 0xFFFF, -1)  # from the private-use planes down


def render_chat(
    template: str,
    messages: Sequence[Message],
    special: SpecialTokens,
    names: dict[str, str],
    add_generation_prompt: bool = True,
    strict: bool = False,
) -> list[Segment]:
    """The prompt for a chat in segments, whose joined texts are what transformers renders.

    Args:
        template: jinja2 source; it gets the helpers and variables that transformers gives it.
        messages: dicts with a `role` and a `content`: a string, or a list of {"type": "text", "text": ...}.
        special: a special token that the template wrote becomes a segment of its own.
        names: the text of `bos_token`, `eos_token`, ..., for the template.
        add_generation_prompt: end with the opening of the assistant's turn.
        strict: raise InputError for a role marker in a message, instead of warning.

    Raises:
        InputError: the messages have another structure, the template fails or tries to leave its sandbox,
            or a message contains a role marker and `strict` is true.
    """
    messages = plain_messages(messages, special)
    check_role_markers(template, messages, special, strict)
    variables = {**names, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}

    used = set(template).union(*names.values(), *special.control, json.dumps(messages, ensure_ascii=False))
    unused = (chr(code) for code in MASKS if chr(code) not in used)
    begin, end = next(unused), next(unused)
    mask = {character: next(unused) for character in sorted(set().union(*special.control))}
    unmask = {ord(masked): character for character, masked in mask.items()}

    hidden = map_contents(messages, partial(special.hide, mask=mask))
    rendered = render(template, variables | {"messages": hidden})
    # Marks around each message's text show which text is the user's. A template that trims the messages or
    # looks at their ends may treat a marked one differently: then the marks go inside the white space, and
    # if that changes the result too, there are no marks.
    for trimmed in (False, True):
        enclosed = map_contents(hidden, partial(enclose, begin=begin, end=end, trimmed=trimmed))
        marked = render(template, variables | {"messages": enclosed})
        if marked.replace(begin, "").replace(end, "") == rendered:
            break
    else:
        marked = rendered

    segments: list[Segment] = []
    origin = "template"
    for stretch in re.split(f"([{begin}{end}])", marked):
        if stretch in (begin, end):
            origin = "text" if stretch == begin else "template"
        else:
            segments += special.split(stretch, origin)
    return [Segment(segment.text.translate(unmask), segment.origin) for segment in segments]


def enclose(text: str, begin: str, end: str, trimmed: bool) -> str:
    """The text with marks at both ends, or, if trimmed, at the ends of what is not white space."""
    core = text.strip() if trimmed else text
    return text.replace(core, begin + core + end, 1) if core else text
