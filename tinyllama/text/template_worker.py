"""The process in which chat templates are rendered: a template is a program that a stranger wrote.

jinja2's sandbox keeps it away from Python, but not from taking all time and memory: `'a' * 10**10` is one
expression. So this process has limits, and the one that asks (`template.py`) ends it when it takes too long.
A request is a line of JSON on stdin, and its answer a line on stdout.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 256 << 20  # bytes, of which this process needs some 40 MB
OUTPUT = 1 << 20  # characters


def serve() -> None:
    """Answer requests until stdin ends."""
    limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = {"text": render(**json.loads(line))}
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY >> 20} MB of memory"}
        except Exception as error:  # a template raises whatever its expressions do
            answer = {"error": " ".join(str(error)[:1000].split()) or type(error).__name__}
        print(json.dumps(answer), flush=True)


def limit_memory() -> None:
    """Limit this process to MEMORY bytes, on systems that can."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such module
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def render(source: str, variables: dict[str, Any]) -> str:
    """The text that a template makes; raises what the template raises."""
    text = compiled(source).render(variables)
    if len(text) > OUTPUT:
        raise TemplateError(f"its text has more than {OUTPUT:,} characters")
    return text


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """The template, in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # The class itself has methods by which a template could change a message: dict.update(messages[0], ...).
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment.from_string(source)


def raise_exception(message: str) -> NoReturn:
    """How a template refuses messages."""
    raise TemplateError(message)
