"""One text being explored, with its forks: what the page asks for by name, and what it may do.

The same views serve the page in a browser and the page in a file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinyllama.errors import InputError
from tinyllama.explorer import views
from tinyllama.explorer.forks import Fork, other_kernel, patched_in, switched_off
from tinyllama.explorer.lines import Trace
from tinyllama.explorer.recording import Recording, record
from tinyllama.kernels import Kernel
from tinyllama.model import Llama
from tinyllama.sampler import Sampler
from tinyllama.text.tokenizer import Tokenizer

ROOM = 256  # tokens that may follow a prompt
MOST_FORKS = 12
KEPT_TRACES = 6


@dataclass(frozen=True)
class Branch:
    """A recording and how it came about."""

    name: str
    python: str
    recording: Recording
    parent: int | None


class Session:
    """A model, a text, and its branches: the original is number 0.

    One computation runs at a time; `cancel` ends the one that runs.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, ids: list[int], name: str, kernels: Mapping[str, Kernel]
    ) -> None:
        self.model, self.tokenizer, self.name, self.kernels = model, tokenizer, name, dict(kernels)
        self.branches: list[Branch] = []
        self.progress = ""
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._traces: OrderedDict[tuple[int, int, int], Trace] = OrderedDict()
        self.begin(ids)

    def begin(self, ids: list[int]) -> None:
        """Start over with another text."""
        recording = record(self.model, ids, ROOM, self._done(len(ids)))
        self.branches = [Branch("original", "logits = model(torch.tensor([ids]))", recording, None)]
        self._traces.clear()

    def cancel(self) -> None:
        """End the computation that runs, at its next part."""
        self._cancelled.set()

    def view(self, name: str, query: Mapping[str, Any]) -> Any:
        """What the page asks for.

        Raises:
            InputError: there is no such view, branch, layer, head or token.
        """
        views_by_name: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "state": self._state,
            "heads": lambda query: views.heads(self._recording(query)),
            "map": lambda query: views.attention_map(*self._place(query, "layer", "head")),
            "row": lambda query: views.attention_row(*self._place(query, "layer", "head", "token")),
            "code": self._code,
            "value": self._value,
            "lens": lambda query: views.lens(
                self._recording(query), self.tokenizer, self._place(query, "token")[1]
            ),
            "attribution": lambda query: views.attribution(*self._place(query, "token", "target")),
            "neurons": self._neurons,
            "rope": self._rope,
            "choice": self._choice,
            "batch": lambda query: views.batch(
                self._recording(query), self.tokenizer, self._encoded(query.get("text"))
            ),
            "cache": lambda query: views.cache_slots(*self._place(query, "token")),
            "compare": lambda query: views.compare(
                self._recording({"branch": query.get("parent", 0)}), self._recording(query), self.tokenizer
            ),
        }
        if name not in views_by_name:
            raise InputError(f"{name!r:.40}: no such view")
        with self._lock:
            return views_by_name[name](query)

    def act(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do what the page asks for: a new text, a step, a fork; gives the state afterwards.

        Raises:
            InputError: it cannot be done; nothing has changed then.
        """
        actions: dict[str, Callable[[Mapping[str, Any]], int]] = {
            "text": self._new_text,
            "step": self._step,
            "fork": self._fork,
            "forget": self._forget,
        }
        if name not in actions:
            raise InputError(f"{name!r:.40}: no such action")
        with self._lock:
            self._cancelled.clear()
            try:
                branch = actions[name](body)
            finally:
                self.progress = ""
            return self._state({}) | {"branch": branch}

    # --- views -------------------------------------------------------------------------------------------

    def _state(self, _query: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "branches": [
                {
                    "name": branch.name,
                    "python": branch.python,
                    "parent": branch.parent,
                    "tokens": views.tokens(branch.recording, self.tokenizer),
                    **views.facts(branch.recording, self.name),
                }
                for branch in self.branches
            ],
            "kernel_names": sorted(self.kernels),
            "largest": views.LARGEST,
        }

    def _recording(self, query: Mapping[str, Any]) -> Recording:
        branch = _integer(query, "branch", len(self.branches), default=0)
        return self.branches[branch].recording

    def _place(self, query: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
        """The recording, and the numbers of those names, each within its limits."""
        recording = self._recording(query)
        config = self.model.config
        limits = {
            "layer": config.num_hidden_layers,
            "head": config.num_attention_heads,
            "token": len(recording.ids),
            "key": len(recording.ids),
            "target": config.vocab_size,
        }
        return (recording, *(_integer(query, name, limits[name]) for name in names))

    def trace(self, recording: Recording, layer: int, token: int) -> Trace:
        """The lines of a layer in the pass of a token; the latest few are kept."""
        one, _ = recording.at(token)
        key = (id(recording), layer, one.start)
        if key not in self._traces:
            self._traces[key] = one.trace(layer)
            while len(self._traces) > KEPT_TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(key)
        return self._traces[key]

    def _code(self, query: Mapping[str, Any]) -> dict[str, Any]:
        recording, layer, token = self._place(query, "layer", "token")
        one, _ = recording.at(token)
        return views.code(one, layer, self.trace(recording, layer, token))

    def _value(self, query: Mapping[str, Any]) -> dict[str, Any]:
        recording, layer, token = self._place(query, "layer", "token")
        one, index = recording.at(token)
        try:
            return views.code_value(one, self.trace(recording, layer, token), str(query.get("key")), index)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"key: no such value, {query.get('key')!r:.60}") from error

    def _neurons(self, query: Mapping[str, Any]) -> Any:
        recording, layer, token = self._place(query, "layer", "token")
        return views.neurons(recording, self.tokenizer, layer, token, self.trace(recording, layer, token))

    def _rope(self, query: Mapping[str, Any]) -> Any:
        recording, layer, head, token, key = self._place(query, "layer", "head", "token", "key")
        return views.rope(recording, layer, head, token, key, self.trace(recording, layer, token))

    def _choice(self, query: Mapping[str, Any]) -> Any:
        recording, token = self._place(query, "token")
        return views.choice(recording, self.tokenizer, token, _sampler(query))

    # --- actions -----------------------------------------------------------------------------------------

    def _new_text(self, body: Mapping[str, Any]) -> int:
        self.begin(self._encoded(body.get("text")))
        return 0

    def _encoded(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise InputError("text: expected a text")
        ids = self.tokenizer.encode(text) or [self.model.config.bos_token_id or 0]
        if len(ids) >= self.model.config.context:
            raise InputError(
                f"the text has {len(ids)} tokens, the context of the model {self.model.config.context}; "
                "shorten it"
            )
        return ids

    def _step(self, body: Mapping[str, Any]) -> int:
        """One token more, by the settings of the page or the one that it names."""
        branch = _integer(body, "branch", len(self.branches), default=0)
        recording = self.branches[branch].recording
        if "id" in body:
            chosen = _integer(body, "id", self.model.config.vocab_size)
        else:
            last = len(recording.ids) - 1
            chosen = views.choice(recording, self.tokenizer, last, _sampler(body))["drawn"]
        recording.extend(chosen)
        return branch

    def _fork(self, body: Mapping[str, Any]) -> int:
        """A branch of another one, with a token forced or something changed."""
        if len(self.branches) > MOST_FORKS:
            raise InputError(f"there are {MOST_FORKS} forks, as many as are kept; forget one")
        parent = _integer(body, "branch", len(self.branches), default=0)
        source = self.branches[parent].recording
        if body.get("kind") == "token":
            token = _integer(body, "token", len(source.ids))
            chosen = _integer(body, "id", self.model.config.vocab_size)
            other = source.forked(token + 1)
            other.extend([*source.ids[len(other.ids) : token + 1], chosen], self._done(token + 2))
            ids = [*source.ids[: token + 1], chosen]
            name = f"{views.text(self.tokenizer, chosen)!r} after token {token}"
            python = f"ids = {ids}\nlogits = model(torch.tensor([ids]))"
        else:
            fork = self._change(body, source)
            other = source.forked(0)
            if source.replacements:
                raise InputError("this branch has a change already; fork the original")
            fork.apply(other)
            other.extend(source.ids, self._done(len(source.ids)))
            name, python = fork.name, fork.python
        self.branches.append(Branch(name, python, other, parent))
        return len(self.branches) - 1

    def _change(self, body: Mapping[str, Any], source: Recording) -> Fork:
        config = self.model.config
        layer = _integer(body, "layer", config.num_hidden_layers)
        heads = body.get("heads")
        if heads is not None:
            listed = heads if isinstance(heads, list) else [heads]
            heads = tuple(_integer({"heads": one}, "heads", config.num_attention_heads) for one in listed)
        kind = body.get("kind")
        if kind == "kernel":
            spec = str(body.get("kernel"))
            if spec not in self.kernels:
                raise InputError(
                    f"kernel: expected one of {', '.join(sorted(self.kernels))}, got {spec!r:.40}"
                )
            return other_kernel(spec, self.kernels[spec], layer, heads)
        if kind == "patch":
            token = _integer(body, "token", len(source.ids))
            text = str(body.get("text"))
            ids = self._encoded(text)
            at = _integer(body, "from", len(ids), default=len(ids) - 1)
            other = record(self.model, ids, 0, self._done(len(ids)))
            head = heads[0] if heads else 0
            return patched_in(str(body.get("part", "layer")), layer, head, token, other, at, text)
        return switched_off(str(kind), layer, heads or ())

    def _forget(self, body: Mapping[str, Any]) -> int:
        branch = _integer(body, "branch", len(self.branches))
        if branch == 0:
            raise InputError("branch: the original stays")
        if any(one.parent == branch for one in self.branches):
            raise InputError("branch: others are forked from it; forget those first")
        del self.branches[branch]
        self.branches = [
            Branch(one.name, one.python, one.recording, one.parent - 1)
            if one.parent is not None and one.parent > branch
            else one
            for one in self.branches
        ]
        return 0

    def _done(self, total: int) -> Callable[[int], None]:
        def done(tokens: int) -> None:
            self.progress = f"{tokens} of {total} tokens"
            if self._cancelled.is_set():
                raise InputError("stopped")

        return done


def _integer(query: Mapping[str, Any], name: str, end: int, default: int | None = None) -> int:
    """A number from 0 up to `end`, from a query's text or from JSON."""
    value = query.get(name, default)
    try:
        number = int(value) if isinstance(value, (str, int)) else -1
    except ValueError:
        number = -1
    if isinstance(value, bool) or not 0 <= number < end:
        raise InputError(f"{name}: expected 0 to {end - 1}, got {value!r:.40}")
    return number


def _sampler(query: Mapping[str, Any]) -> Sampler:
    """The settings of the page."""
    try:
        return Sampler(
            temperature=float(query.get("temperature", 0)),
            top_k=int(query.get("top_k", 0)),
            top_p=float(query.get("top_p", 1)),
            repetition_penalty=float(query.get("repetition_penalty", 1)),
            seed=int(query.get("seed", 0)) % 2**63,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"settings: {error}") from error
