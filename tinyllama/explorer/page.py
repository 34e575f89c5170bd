"""The page: one HTML file with its style and script, and a session's answers if it is to be kept."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tinyllama.checkpoints.files import replace_text
from tinyllama.explorer.session import Session
from tinyllama.pages import render

# The settings with which the page begins, in the order of its form.
SETTINGS = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 0}


def page(saved: Mapping[str, Any]) -> str:
    """The HTML, whose own script and style alone may run.

    Args:
        saved: answers by what is asked for ("heads?branch=0"); empty for a page that asks a server.
    """
    data = base64.b64encode(zlib.compress(json.dumps(saved, allow_nan=False).encode(), 9)) if saved else b""
    connect = "'none'" if saved else "'self'"
    return render(
        "tinyllama.explorer", {}, lambda key, value: str(value), connect=connect, saved=data.decode()
    )


def save(session: Session, path: Path, layer: int | None = None, head: int = 0) -> None:
    """Write a page that opens offline; the layer whose code it holds is by default the middle one.

    Raises:
        InputError: the file cannot be written.
    """
    middle = session.model.config.num_hidden_layers // 2
    replace_text(path, page(answers(session, middle if layer is None else layer, head)))


def answers(session: Session, layer: int, head: int) -> dict[str, Any]:
    """What a page in a file needs, by what its script asks for.

    Every branch has its text, patterns, lens, attributions and choices; the code's values, exact weights and
    neurons are those of one layer, and positions those of one head and the last token.
    """
    found: dict[str, Any] = {}

    def keep(name: str, **query: Any) -> Any:
        answer = _rounded(session.view(name, query))
        found[f"{name}?{urlencode(query)}"] = answer
        return answer

    same: dict[str, str] = {}
    state = keep("state")
    for number, branch in enumerate(state["branches"]):
        tokens, at = len(branch["tokens"]), {"branch": number}
        keep("heads", **at)
        if branch["parent"] is not None:
            keep("compare", **at, parent=branch["parent"])
        for one in range(branch["L"]):
            for other in range(branch["H"]):
                keep("map", **at, layer=one, head=other)
        for token in range(tokens):
            keep("lens", **at, token=token)
            keep("attribution", **at, token=token, target=branch["tokens"][token]["next"][0][0])
            keep("cache", **at, token=token)
            keep("choice", **at, token=token, **SETTINGS)
            keep("neurons", **at, layer=layer, token=token)
            for other in range(branch["H"]):
                keep("row", **at, layer=layer, head=other, token=token)
        for key in range(tokens):
            keep("rope", **at, layer=layer, head=head, token=tokens - 1, key=key)
        for start, _end in branch["passes"]:
            code = keep("code", **at, token=start, layer=layer)
            others = {at for number, at in enumerate(code["enters"]) if number != layer}
            steps = (step for number, step in enumerate(code["steps"]) if number not in others)
            for value in (value for step in steps for value in step["values"]):
                query = {**at, "token": start, "layer": layer, "key": value["key"]}
                name = f"value?{urlencode(query)}"
                answer = session.view("value", query)
                digest = hashlib.sha256(json.dumps(answer).encode()).hexdigest()
                found[name] = {"same": same[digest]} if digest in same else answer
                same.setdefault(digest, name)
    return found


def _rounded(value: Any) -> Any:
    """The same with eight digits in every number; three are shown."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
