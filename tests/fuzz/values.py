"""Strategies for what nobody would write: values, JSON with edits, bytes with edits, protocol buffers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


TEXTS = [
    "", "x", "é你🙂", "\x1b]0;title\x07\x1b[2J", "a\x00b", "\ud800", "\u202e", "../../etc/passwd", "[bold]",
    "{{ x }}", "1e999", "-1", "null", "<s>", "</s>", "\n\n", " ", "x" * 6000, "(" * 3000, "9" * 5000,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 127, 2**15, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 0.0, -0.0, 0.5, 1.5,
    -1.5, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
SCALARS = [None, True, False, *NUMBERS, *TEXTS]
hostile: SearchStrategy[Any] = st.one_of(
    *[st.sampled_from(SCALARS)] * 5,  # they break most
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    # Made anew each time, because edits change them.
    st.sampled_from([(0,), (1,), (60,), (3000,), ()]).map(lambda depth: nested(*depth) if depth else {}),
    st.sampled_from([0, 1, 70000]).map(lambda size: [None] * size),
    st.lists(st.sampled_from(SCALARS), max_size=4),
    st.dictionaries(st.sampled_from(TEXTS), st.sampled_from(SCALARS), max_size=3),
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in some JSON; of long lists and objects only the ends."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if len(at) > 6:
        return [at]
    if len(keys) > 12:
        keys = keys[:6] + keys[-6:]
    return [at] + [place for key in keys for place in places(tree[key], (*at, key))]


@st.composite
def edited(draw: DrawFn, tree: Any, extra: Sequence[str] = ()) -> bytes:
    """JSON with one to three values replaced, removed, renamed, added or doubled; sometimes bytes too."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(tree)))
        if not place:
            if isinstance(tree, dict) and draw(st.integers(0, 9)):
                tree[draw(st.sampled_from(extra) if extra else st.sampled_from(TEXTS))] = draw(hostile)
            else:
                tree = draw(hostile)
            continue
        *path, key = place
        parent = tree
        for step in path:
            parent = parent[step]
        match draw(st.integers(0, 5)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent.insert(key, draw(hostile))
            case 3 if isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS))] = parent[key]
            case _:
                parent[key] = draw(hostile)
    try:
        text = json.dumps(tree).encode()
    except RecursionError:
        text = b"[" * 100_000
    return draw(damaged(text)) if draw(st.integers(0, 9)) == 9 else text


@st.composite
def damaged(draw: DrawFn, data: bytes) -> bytes:
    """Bytes with one to three cuts, insertions, repetitions and flips."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
            case 2:
                data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at + 1 :]
            case 3:
                data = data[:at] + data[at : at + draw(st.integers(1, 64))] * 2 + data[at + 64 :]
            case 4:
                data = data[:at] + draw(st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7]))
    return data


@st.composite
def header_edited(draw: DrawFn, file: bytes) -> bytes:
    """A safetensors file with edits in the header's JSON, its length, or the data behind it."""
    size = int.from_bytes(file[:8], "little")
    header, data = file[8 : 8 + size], file[8 + size :]
    if draw(st.integers(0, 9)):
        header = draw(edited(json.loads(header), ("__metadata__", "model.layers.9.x")))
    length = draw(
        st.sampled_from([len(header)] * 6 + [0, 1, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1])
    )
    if not draw(st.integers(0, 4)):
        data = draw(damaged(data[:4096])) + data[4096:]
    return length.to_bytes(8, "little") + header + data


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of a protocol buffer, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def as_varint(value: int) -> bytes:
    """The bytes of a number of up to 64 bits."""
    value, out = value & (2**64 - 1), b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def fields(data: bytes) -> list[tuple[int, bytes | int]]:
    """A message as (tag, value): numbers as they are, everything else as bytes."""
    found: list[tuple[int, bytes | int]] = []
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            number, at = varint(data, at)
            found.append((tag, number))
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, at = varint(data, at)
        found.append((tag, data[at : at + size]))
        at += size
    return found


def message(parts: list[tuple[int, bytes | int]]) -> bytes:
    """The bytes of a message."""
    out = b""
    for tag, value in parts:
        out += as_varint(tag)
        if isinstance(value, int):
            out += as_varint(value)
        else:
            out += (as_varint(len(value)) if tag & 7 == 2 else b"") + value
    return out


@st.composite
def message_edited(draw: DrawFn, data: bytes, depth: int = 2) -> bytes:
    """A protocol buffer with edits in its fields, or in those of a message within."""
    parts = fields(data)
    for _ in range(draw(st.integers(1, 2))):
        index = draw(st.integers(0, len(parts) - 1)) if parts else 0
        if not parts:
            break
        tag, value = parts[index]
        match draw(st.integers(0, 4)):
            case 0:
                del parts[index]
            case 1:
                parts.insert(index, parts[index])
            case 2:
                parts[index] = (draw(st.sampled_from([8, 10, 16, 18, 21, 24, 26, 8 * 99 + 2])), value)
            case _ if isinstance(value, int):
                parts[index] = (tag, draw(st.sampled_from([0, 1, 2, 5, 300, 2**31, 2**63, 2**64 - 1])))
            case 3 if depth and tag & 7 == 2 and value:
                try:
                    parts[index] = (tag, draw(message_edited(value, depth - 1)))
                except IndexError:  # a text, not a message
                    parts[index] = (tag, draw(damaged(value)))
            case _:
                new = draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=5)))
                parts[index] = (tag, new.encode("utf-8", "surrogatepass"))
    return message(parts)


def joined(*parts: SearchStrategy[str], by: str = "") -> SearchStrategy[str]:
    """Texts one after the other."""
    join: Callable[[tuple[str, ...]], str] = by.join
    return st.tuples(*parts).map(join)
