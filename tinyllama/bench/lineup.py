"""Who takes part: our modes and the peers, each built, or left out with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tinyllama.bench.gguf_file import write_gguf
from tinyllama.bench.llama_cpp_api import gguf_path, require_llama_cpp
from tinyllama.bench.llama_cpp_peer import LlamaCpp
from tinyllama.bench.measure import Figure, Subject
from tinyllama.bench.names import COMPILED, DTYPES, GGUF_KINDS, HF, MODES, Mode
from tinyllama.bench.ours import Ours
from tinyllama.bench.transformers_peer import CompiledTransformers, Transformers
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.model import Llama


@dataclass
class Lineup:
    """Subjects that can be measured, and why others cannot.

    Attributes:
        folder: the checkpoint.
        config: its shape.
        device: where the subjects run.
        decode: the figure that the compiled peer is compiled for.
        subjects: those built, in order.
        left_out: reasons by name.
    """

    folder: Path
    config: LlamaConfig
    device: str
    decode: Figure
    subjects: list[Subject] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    exact: dict[str, Llama] = field(default_factory=dict)

    def build(self, names: Sequence[str], done: Callable[[str], object] = lambda what: None) -> None:
        """Build every subject in turn."""
        for name in names:
            done(f"{name}: loading")
            with self.leaving_out(name):
                self.subjects.append(self._subject(name))

    @contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        """Leave a peer out that fails, with the reason; one of ours only where there is no room for it."""
        kinds = (InputError,) if name in MODES else (Exception,)
        try:
            yield
        except kinds as error:
            line = (str(error).strip().splitlines() or [""])[0]
            self.left_out[name] = line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"

    def _subject(self, name: str) -> Subject:
        makers: dict[str, Callable[[], Subject]] = {
            **{mode: partial(self._ours, mode) for mode in MODES},
            **{f"{HF}{dtype}": partial(self._transformers, f"{HF}{dtype}", dtype) for dtype in DTYPES},
            **{
                f"{COMPILED}{dtype}": partial(self._compiled, f"{COMPILED}{dtype}", dtype) for dtype in DTYPES
            },
            **{peer: partial(self._llama_cpp, peer) for peer in GGUF_KINDS},
        }
        return makers[name]()

    def _ours(self, name: str) -> Subject:
        mode = MODES[name]
        exact = mode.weights == "exact"
        return Ours(name, self._exact(mode.dtype) if exact else mode.load(self.folder, self.device))

    def _exact(self, dtype: str) -> Llama:
        """Our model that shares its tensors with the peers of that dtype."""
        if dtype not in self.exact:
            self.exact[dtype] = Mode(dtype, "exact").load(self.folder, self.device)
        return self.exact[dtype]

    def _transformers(self, name: str, dtype: str) -> Subject:
        return Transformers(name, self._exact(dtype))

    def _compiled(self, name: str, dtype: str) -> Subject:
        return CompiledTransformers(name, self._exact(dtype), self.decode)

    def _llama_cpp(self, name: str) -> Subject:
        require_llama_cpp()
        if self.device != "cpu":
            raise InputError("is measured on the CPU alone")
        path = gguf_path(self.folder, name)
        return LlamaCpp(name, path, write_gguf(self.folder, path, GGUF_KINDS[name]), self.config)
