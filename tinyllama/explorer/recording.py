"""Record what a Llama computes for a text: the values of every layer, and the lines of code that made them.

```python
recording = tinyllama.explorer.record(model, ids)
recording.passes[0].streams[3]  # the residual stream into layer 3, (1, T, C)
for step in recording.passes[0].trace(3).steps:  # layer 3's code, statement by statement
    print(step.line, {name: tuple(value.shape) for name, value in step.values.items()})
recording.extend(id)  # one decode step from the cache
```
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import tinyllama.attention
import tinyllama.cache
import tinyllama.kernels
import tinyllama.model
import tinyllama.rope
from tinyllama.attention import AttentionMask, Kernel, eager, sdpa
from tinyllama.errors import InputError
from tinyllama.explorer.lines import Trace, watched
from tinyllama.generation import prefill
from tinyllama.hooks import hooked, patch
from tinyllama.kernels import ByHead, kernel_code
from tinyllama.model import Block, Llama

# A prompt is read in parts of this many tokens, so that no layer's scores fill the memory.
PART = 128
# Patterns of a pass are kept up to this many numbers; those of a longer one are computed again by layer.
KEPT_NUMBERS = 1 << 24
COLUMNS = 64  # of the small maps
MODEL_FILES = tuple(
    str(module.__file__)
    for module in (tinyllama.model, tinyllama.attention, tinyllama.rope, tinyllama.cache, tinyllama.kernels)
)


@dataclass
class HeadRows:
    """What each query of a layer's heads does with its attention; each (H, T).

    Attributes:
        entropy: in nats: 0 looks at one token, ln(S) at all alike.
        distance: how many tokens back it looks, on average.
        sink: the share that goes to the first token.
        previous: the share that goes to the token before.
        induction: the share that goes to what followed the last occurrence of the same token.
        columns: the pattern itself in COLUMNS parts of the text, the largest of each, (H, T, COLUMNS).
    """

    entropy: Tensor
    distance: Tensor
    sink: Tensor
    previous: Tensor
    induction: Tensor
    columns: Tensor


@dataclass
class Pass:
    """One forward pass: a part of the prompt, or one token of decoding.

    Attributes:
        recording: the one that it belongs to.
        start: the position of its first token.
        ids: its tokens, T of them.
        streams: the residual stream into each layer and out of the last, L + 1 times (1, T, C).
        middles: the stream between attention and MLP, L times (1, T, C).
        z: the heads' outputs, L times (1, H, T, D).
        mlps: what each MLP adds, L times (1, T, C).
        heads: see HeadRows; None for a layer whose kernel shows no pattern.
        patterns: (H, T, S) for each layer, where they are kept.
        logits: of the last token, (V,).
        top: the most likely next tokens after each token and their log-probabilities, each (T, 10).
        surprise: -ln p of the token that follows each, (T,); NaN for the last of the text.
        code: the lines of everything outside the layers.
    """

    recording: Recording
    start: int
    ids: list[int]
    streams: list[Tensor] = field(default_factory=list)
    middles: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)
    heads: list[HeadRows | None] = field(default_factory=list)
    patterns: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    top: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    surprise: Tensor = field(default_factory=lambda: torch.empty(0))
    code: Trace = field(default_factory=Trace)
    mask: AttentionMask | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.ids)

    def pattern(self, layer: int) -> Tensor | None:
        """The attention pattern of a layer, (H, T, S); None if its kernel shows none."""
        if layer in self.patterns or self.heads[layer] is None:
            return self.patterns.get(layer)
        return self.value(layer, f"layers.{layer}.self_attn.pattern")[0]

    def value(self, layer: int, address: str) -> Tensor:
        """The value at an address of a layer, by running its code once more on what came into it."""
        found: list[Tensor] = []
        with self.recording.changes(layer), hooked(self.recording.model, {address: found.append}):
            self._run(layer)
        return found[-1]

    def trace(self, layer: int) -> Trace:
        """The lines of a layer and their values, by running its code once more on what came into it."""
        model = self.recording.model
        inside = [path for path, _ in model.layers[layer].named_modules() if path and ".kernel" not in path]
        with self.recording.changes(layer), watched(self.recording.files) as trace:
            notes = {
                f"layers.{layer}.{path}": partial(_note, trace, path.rpartition(".")[2]) for path in inside
            }
            with hooked(model, notes):
                self._run(layer)
        return trace

    @torch.no_grad()
    def _run(self, layer: int) -> None:
        """The layer's forward pass again: it writes into the cache what is there already."""
        self.recording.start = self.start
        assert self.rotation is not None
        assert self.mask is not None
        self.recording.model.layers[layer](
            self.streams[layer], self.rotation, self.mask, self.recording.cache
        )


class Recording:
    """A text and what the model computed for it, token by token.

    Attributes:
        model: the model, whose kernels may have changed since.
        ids: the text.
        prompt: how many tokens of it were given; what follows was chosen.
        passes: the forward passes, in the order of the text.
        cache: the keys and values of the text.
        replacements: a fork's: address -> function from a value and its first position to another value.
        kernels: of each layer; sdpa is recorded as eager, which is the same function written out.
    """

    def __init__(self, model: Llama, ids: Sequence[int], capacity: int) -> None:
        context = model.config.context
        if not ids:
            raise InputError("ids: expected one token at least; BOS stands for an empty text")
        if len(ids) > context:
            raise InputError(f"the text has {len(ids)} tokens, the context {context}; shorten it")
        self.model = model
        self.ids: list[int] = []
        self.passes: list[Pass] = []
        self.cache = model.new_cache(1, min(max(capacity, len(ids)), context))
        self.kernels: list[Kernel] = [shown(attention.kernel) for attention in model.attentions]
        self.start = 0  # of the pass that runs
        self.prompt = len(ids)
        self.watch_kernels()
        self.width = -(-self.cache.capacity // COLUMNS)  # tokens in a column of the small maps
        self.replacements: dict[str, Callable[[Tensor, int], Tensor]] = {}

    def extend(self, ids: int | Iterable[int], done: Callable[[int], None] = lambda tokens: None) -> None:
        """Run the model on the next tokens.

        Args:
            ids: one, as in decoding, or several.
            done: is told how many tokens of the text are computed.

        Raises:
            InputError: the cache has no room for them.
        """
        new = [ids] if isinstance(ids, int) else list(ids)
        for start in range(0, len(new), PART):
            part = new[start : start + PART]
            self.cache.length = len(self.ids)
            self.cache.start(len(part))  # refused before anything changes
            self.passes.append(self._record(part))
            self.ids += part
            done(len(self.ids))

    def at(self, token: int) -> tuple[Pass, int]:
        """The pass of the token at a position of the text, and its index in it."""
        for one in self.passes:
            if one.start <= token < one.end:
                return one, token - one.start
        raise InputError(f"token: expected 0 to {len(self.ids) - 1}, got {token}")

    def watch_kernels(self) -> None:
        """Let the code that is traced be the model's and the kernels'."""
        self.files = {*MODEL_FILES, *_files(self.kernels)}

    def forked(self, tokens: int) -> Recording:
        """A recording of its own of the first tokens, or a few less: with this one's passes and cache."""
        other = Recording(self.model, self.ids, self.cache.capacity)
        other.kernels, other.replacements, other.files = list(self.kernels), self.replacements, self.files
        other.prompt = self.prompt
        other.passes = [one for one in self.passes if one.end <= tokens]
        if other.passes:
            last = other.passes[-1] = copy.copy(other.passes[-1])
            last.surprise = last.surprise.clone()  # of what follows in this one
            last.surprise[-1] = torch.nan
            other.ids = self.ids[: last.end]
            slots = slice(0, 1 + last.end)
            other.cache.keys[..., slots, :] = self.cache.keys[..., slots, :]
            other.cache.values[..., slots, :] = self.cache.values[..., slots, :]
        return other

    @contextmanager
    def changes(self, layer: int | None = None) -> Iterator[None]:
        """The model as it is recorded: with these kernels, and with a fork's replacements.

        Args:
            layer: the one that runs; None: all.
        """
        attentions = self.model.attentions
        before = [attention.kernel for attention in attentions]
        try:
            for attention, kernel in zip(attentions, self.kernels, strict=True):
                attention.kernel = kernel
            replacements = {
                address: partial(_from, self, change)
                for address, change in self.replacements.items()
                if layer is None or f"{address}.".startswith(f"layers.{layer}.")
            }
            with patch(self.model, replacements) if replacements else nullcontext():
                yield
        finally:
            for attention, kernel in zip(attentions, before, strict=True):
                attention.kernel = kernel

    @torch.no_grad()
    def _record(self, part: list[int]) -> Pass:
        """One pass, with everything that is kept of it."""
        model, one = self.model, Pass(self, len(self.ids), part)
        self.start = one.start
        L = model.config.num_hidden_layers
        keep: dict[str, Callable[[Tensor], Tensor | None]] = {"embed_tokens": one.streams.append}
        seen: dict[int, HeadRows] = {}
        layers = range(L)
        for n in layers:
            keep |= {
                f"layers.{n}": one.streams.append,
                f"layers.{n}.self_attn.z": one.z.append,
                f"layers.{n}.mlp": one.mlps.append,
                f"layers.{n}.self_attn.pattern": partial(self._see_pattern, one, seen, n),
            }
        keep["rotary"] = lambda rotation: setattr(one, "rotation", rotation)

        def middle(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            one.middles.append(args[0])

        def masked(_module: nn.Module, args: tuple[Any, ...]) -> None:
            one.mask = args[2]

        ids = torch.tensor([part], device=self.cache.keys.device)
        with ExitStack() as hooks:
            for block in model.layers:
                assert isinstance(block, Block)
                hooks.callback(block.post_attention_layernorm.register_forward_pre_hook(middle).remove)
            hooks.callback(model.layers[0].register_forward_pre_hook(masked).remove)
            hooks.enter_context(self.changes())
            hooks.enter_context(hooked(model, keep))
            one.code = hooks.enter_context(watched(self.files, skip=_is_layer))
            hidden = model.hidden_states(ids, self.cache)
        one.heads = [seen.get(n) for n in layers]
        self._predict(one, hidden)
        return one

    def _predict(self, one: Pass, hidden: Tensor) -> None:
        """Log-probabilities of the next tokens, in parts: those of a long text fill the memory."""
        following = torch.tensor([*one.ids[1:], -1], device=hidden.device)
        if self.passes:  # what the pass before could not know
            last = self.passes[-1]
            last.surprise[-1] = -last.logits.float().log_softmax(-1)[one.ids[0]]
        tops, surprises = [], []
        for part, after in zip(hidden[0].split(64), following.split(64), strict=True):
            logits = self.model.lm_head(part)
            one.logits = logits[-1]
            log_p = logits.float().log_softmax(-1)
            tops.append(log_p.topk(min(10, log_p.shape[-1])))
            surprises.append(-log_p.gather(1, after.clamp(min=0)[:, None])[:, 0])
        one.top = torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])
        one.surprise = torch.cat(surprises)
        one.surprise[-1] = torch.nan

    def _see_pattern(self, one: Pass, seen: dict[int, HeadRows], layer: int, pattern: Tensor) -> None:
        """Keep what is small of a layer's pattern (1, H, T, S), or all of it."""
        rows = pattern[0].float()
        H, T, S = rows.shape
        L = self.model.config.num_hidden_layers
        ids = torch.tensor([*self.ids, *one.ids][:S])
        queries = torch.arange(one.start, one.start + T)
        back = queries[:, None] - torch.arange(S)
        after = ids.unsqueeze(0) == ids[queries].unsqueeze(1)  # (T, S): the same token
        after = torch.cat([torch.zeros(T, 1, dtype=torch.bool), after[:, :-1]], dim=1) & (back >= 0)
        last = (after * torch.arange(S)).amax(dim=1)  # what followed its last occurrence; 0: there was none
        induction = rows.gather(2, last.expand(H, T)[..., None].to(rows.device))[..., 0]
        padded = torch.nn.functional.pad(rows, (0, self.width * COLUMNS - S))
        seen[layer] = HeadRows(
            entropy=torch.special.entr(rows).sum(-1),
            distance=(rows * back.to(rows)).sum(-1),
            sink=rows[..., 0],
            previous=(rows * (back == 1).to(rows)).sum(-1),
            induction=induction * (last > 0).to(rows),
            columns=padded.unflatten(-1, (COLUMNS, self.width)).amax(-1),
        )
        if rows.numel() * L <= KEPT_NUMBERS:
            one.patterns[layer] = pattern[0]


@dataclass(frozen=True)
class Batch:
    """Texts of different lengths in one pass, as `generate` reads them; T is the longest, S the slots read.

    Attributes:
        positions: of each row's columns, (B, T); -1 is padding, which stands on the left.
        visible: which slots the last query of each row may look at, (B, S).
        written: which slots hold keys, (B, 1 + S); slot 0 takes those of padding, slot p + 1 position p.
        logits: of each row's next token, (B, V).
    """

    positions: Tensor
    visible: Tensor
    written: Tensor
    logits: Tensor


def together(recording: Recording, other: Sequence[int]) -> Batch:
    """Read a recording's text and another one in one batch, with its kernels and changes."""
    model, prompts = recording.model, [recording.ids, list(other)]
    cache = model.new_cache(2, max(map(len, prompts)))
    masks: list[AttentionMask] = []

    def masked(_module: nn.Module, args: tuple[Any, ...]) -> None:
        masks.append(args[2])

    handle = model.layers[0].register_forward_pre_hook(masked)
    recording.start = 0
    try:
        with recording.changes():
            logits = prefill(model, prompts, cache, PART)
    finally:
        handle.remove()
    return Batch(
        positions=torch.cat([mask.query_positions.expand(2, -1) for mask in masks], dim=1),
        visible=masks[-1].allowed[:, 0, -1].expand(2, -1),
        written=(cache.keys != 0).any(4).any(2).any(0),
        logits=logits,
    )


def record(
    model: Llama,
    ids: Sequence[int],
    capacity: int | None = None,
    done: Callable[[int], None] = lambda tokens: None,
) -> Recording:
    """Run a text through the model and keep what it computes.

    Attention by `sdpa` is recorded as `eager`, the same function written out, which shows scores and pattern.

    Args:
        model: the model; its kernels are those that are recorded.
        ids: the text, from one token to the context.
        capacity: how many tokens may follow in the same recording, by `extend`; None: 64.
        done: is told how many tokens are computed.

    Raises:
        InputError: the text is empty or too long.
    """
    recording = Recording(model, ids, len(ids) + (64 if capacity is None else capacity))
    recording.extend(ids, done)
    return recording


def _note(trace: Trace, name: str, value: Tensor) -> None:
    trace.note(name, value)


def _from(recording: Recording, change: Callable[[Tensor, int], Tensor], value: Tensor) -> Tensor:
    """What a change makes of a value of the pass that runs."""
    return change(value, recording.start)


def _is_layer(frame: FrameType) -> bool:
    return frame.f_code is Block.forward.__code__


def shown(kernel: Kernel) -> Kernel:
    """The kernel, with eager in the place of sdpa."""
    if isinstance(kernel, ByHead):
        return ByHead(shown(kernel.kernel), kernel.heads, shown(kernel.others))
    return eager if kernel is sdpa else kernel


def _files(kernels: Iterable[Kernel]) -> Iterator[str]:
    """Where the kernels are written, those of single heads too."""
    for kernel in kernels:
        if isinstance(kernel, ByHead):
            yield from _files([kernel.kernel, kernel.others])
        if code := kernel_code(kernel):
            yield code.co_filename
