"""Watch Python code run: which lines, in which order, and what each one bound.

The values are those of the run itself. `sys.monitoring` watches where Python has it (3.12), under a tool
number that nobody uses; before that `sys.settrace`, which goes on telling a debugger or coverage what it
would have heard.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

RETURNED = "return"  # the name of what a function gives back


@dataclass
class Step:
    """One statement that ran.

    Attributes:
        call: which of the calls it belongs to.
        line: where the statement begins, from 1.
        values: what it bound: name -> value; RETURNED for a return, an address for what a module gave out.
    """

    call: int
    line: int
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One function that ran.

    Attributes:
        code: the function's.
        name: with its class: `Attention.forward`.
        caller: the index of the step that called it, among all steps; None for the first.
        arguments: its arguments' values; not copies.
    """

    code: CodeType
    name: str
    caller: int | None
    arguments: dict[str, Tensor]

    @property
    def file(self) -> str:
        """Where its source is."""
        return self.code.co_filename

    @property
    def source(self) -> tuple[int, list[str]]:
        """The number of its first line, and its lines."""
        return function_source(self.code)


@dataclass
class Trace:
    """What ran, in its order.

    Attributes:
        calls: the functions.
        steps: their statements.
        left_out: the index of the step that made each call which is not watched.
        running: the functions that run now.
    """

    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    running: list[_Open] = field(default_factory=list, repr=False)
    _copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def note(self, name: str, value: Tensor) -> None:
        """Add a value to the statement that runs now, such as what a module within it gave out."""
        if self.running and (index := self.running[-1].step) is not None:
            self.steps[index].values |= self.kept({name: value})

    def kept(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """Copies of the tensors among some values: the code goes on, and may write into what it has bound."""
        found = {}
        for name, value in _tensors(values).items():
            key = id(value), 0 if value.is_inference() else value._version
            if key not in self._copies or value.is_inference():
                # The value itself stays for as long as the code runs: another one could get its id.
                self._copies[key] = value, value.detach().clone()
            found[name] = self._copies[key][1]
        return found

    def end(self) -> None:
        """The code has run."""
        self._copies.clear()


@contextmanager
def watched(
    files: Collection[str], skip: Callable[[FrameType], bool] = lambda frame: False
) -> Iterator[Trace]:
    """Watch the functions of these files in this thread while the block runs.

    Args:
        files: paths, as in `code.co_filename`.
        skip: whether a call, with all that it calls, is left out.

    Yields:
        The trace, which grows.
    """
    watcher = _Watcher(frozenset(files), skip)
    start = _monitored if hasattr(sys, "monitoring") else _traced
    with start(watcher):
        yield watcher.trace
    watcher.trace.end()


class _Watcher:
    """What happens at the start of a function, at each line and at its end."""

    def __init__(self, files: frozenset[str], skip: Callable[[FrameType], bool]) -> None:
        self.files, self.skip, self.trace = files, skip, Trace()
        self._skipped: FrameType | None = None

    def wants(self, code: CodeType) -> bool:
        return code.co_filename in self.files and code.co_name[0] not in "<_"

    def start(self, frame: FrameType) -> None:
        running = self.trace.running
        if self._skipped is not None:
            return
        if self.skip(frame):
            self._skipped = frame
            if running and running[-1].step is not None:
                self.trace.left_out.append(running[-1].step)
            return
        seen = dict(frame.f_locals)
        name = getattr(frame.f_code, "co_qualname", None) or _qualified(frame)
        self.trace.calls.append(
            Call(frame.f_code, name, running[-1].step if running else None, _tensors(seen))
        )
        running.append(_Open(frame, len(self.trace.calls) - 1, seen))

    def line(self, frame: FrameType) -> None:
        one = self._current(frame)
        if one is None:
            return
        line, steps = statement(frame.f_code, frame.f_lineno), self.trace.steps
        if one.step is not None and steps[one.step].line == line and line in _long_statements(frame.f_code):
            return  # a later line of the same statement
        self._finish(one)
        one.step = len(steps)
        steps.append(Step(one.call, line))

    def end(self, frame: FrameType, value: Any) -> None:
        if frame is self._skipped:
            self._skipped = None
        one = self._current(frame)
        if one is None:
            return
        self._finish(one)
        if one.step is not None:
            self.trace.steps[one.step].values.update(self.trace.kept({RETURNED: value}))
        self.trace.running.pop()

    def _current(self, frame: FrameType) -> _Open | None:
        running = self.trace.running
        return running[-1] if running and running[-1].frame is frame and not self._skipped else None

    def _finish(self, one: _Open) -> None:
        """Note what the statement that is over has bound."""
        now = one.frame.f_locals
        if one.step is not None:
            changed = {name: value for name, value in now.items() if one.seen.get(name) is not value}
            step = self.trace.steps[one.step]
            step.values = {**self.trace.kept(changed), **step.values}
        one.seen = dict(now)


@dataclass
class _Open:
    """A function that runs: its frame, its place among the calls, what it has bound, its statement."""

    frame: FrameType
    call: int
    seen: dict[str, Any]
    step: int | None = None


@contextmanager
def _traced(watcher: _Watcher) -> Iterator[None]:
    before = sys.gettrace()

    def chained(other: Any, frame: FrameType, event: str, value: Any) -> Any:
        return other(frame, event, value) if other is not None else None

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        other = chained(before, frame, event, value)
        if not watcher.wants(frame.f_code):
            return other
        watcher.start(frame)

        def local(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal other
            other = chained(other, frame, event, value)
            if event == "line":
                watcher.line(frame)
            elif event == "return":
                watcher.end(frame, value)
            return local

        return local

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _monitored(watcher: _Watcher) -> Iterator[None]:
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    events, tool = monitoring.events, next(n for n in (4, 3, 5, 1, 0) if monitoring.get_tool(n) is None)
    thread = threading.get_ident()

    def when(handle: Callable[..., None]) -> Callable[..., Any]:
        def callback(code: CodeType, _place: int, *value: Any) -> Any:
            if not watcher.wants(code):
                return monitoring.DISABLE
            frame = sys._getframe(1)
            if frame.f_code is code and threading.get_ident() == thread:
                handle(frame, *value)
            return None

        return callback

    monitoring.use_tool_id(tool, "tinyllama")
    try:
        monitoring.register_callback(tool, events.PY_START, when(watcher.start))
        monitoring.register_callback(tool, events.LINE, when(lambda frame: watcher.line(frame)))
        monitoring.register_callback(tool, events.PY_RETURN, when(watcher.end))
        monitoring.restart_events()
        monitoring.set_events(tool, events.PY_START | events.LINE | events.PY_RETURN)
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among some values, those of a tuple one by one."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            parts = ((f"{name}[{index}]", part) for index, part in enumerate(value))
            found |= {part: one for part, one in parts if isinstance(one, Tensor)}
    return found


def _qualified(frame: FrameType) -> str:
    """The name of the function with its class, before Python 3.11 knew it."""
    owner = frame.f_locals.get("self")
    return f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_name


@cache
def function_source(code: CodeType) -> tuple[int, list[str]]:
    """The number of a function's first line and its lines, as they are now; empty if there is no source."""
    linecache.checkcache(code.co_filename)
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError):
        return code.co_firstlineno, []
    return max(first, 1), [line.rstrip("\n") for line in lines]


def statement(code: CodeType, line: int) -> int:
    """The first line of the innermost statement that a line belongs to."""
    return _statements(code).get(line, line)


@cache
def _statements(code: CodeType) -> dict[int, int]:
    first, lines = function_source(code)
    try:
        tree = ast.parse(textwrap.dedent("\n".join(lines)))
    except SyntaxError:
        return {}
    found: dict[int, int] = {}
    for node in ast.walk(tree):  # outer statements come first
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            found |= dict.fromkeys(range(first + node.lineno - 1, first + last), first + node.lineno - 1)
    return found


@cache
def _long_statements(code: CodeType) -> frozenset[int]:
    """Where statements of more than one line begin."""
    starts = list(_statements(code).values())
    return frozenset(line for line in starts if starts.count(line) > 1)
