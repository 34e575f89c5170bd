"""llama.cpp as a peer, through llama-cpp-python; importing this takes no PyTorch, for loads are timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama.bench.peers import Setup, cached_bytes, random_ids
from tinyllama.checkpoints.config_file import read_config
from tinyllama.errors import InputError


class LlamaCpp:
    """llama.cpp on the CPU with the package's defaults, one text at a time; caches are float16."""

    batches = False  # llama-cpp-python has no simple call for several texts

    def __init__(self, name: str, setup: Setup) -> None:
        import llama_cpp

        self.name, self.setup, self.package = name, setup, llama_cpp
        self.states: dict[int, Any] = {}

    def load(self) -> None:
        """Open the GGUF file; the first time, write it from the checkpoint."""
        if self.setup.device != "cpu":
            raise InputError("is measured on the CPU only")
        path = Path(self.setup.scratch) / f"{self.name}.gguf"
        if not path.exists():
            from tinyllama.bench.gguf_file import write_gguf

            write_gguf(Path(self.setup.folder), path, self.name.partition("-")[2])
        threads = self.setup.threads
        try:
            self.model = self.package.Llama(
                str(path),
                n_ctx=self.setup.context,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"llama.cpp cannot open its file: {error}") from error
        config = read_config(self.setup.folder)
        self.ids = random_ids(self.setup, config)
        self.cached_bytes = cached_bytes(config, 2)
        matrices = sum(config.parameters.values()) - config.parameters["norms"]
        table = 0 if config.tie_word_embeddings else config.parameters["embedding"]
        # The table has the same number of bits a weight as the other matrices.
        self.weight_bytes = path.stat().st_size * (matrices - table) // matrices

    def prefill(self, length: int) -> int:
        """Compute a prompt in an empty cache."""
        self.model.reset()
        return self._next(self.ids[:length])

    def decode(self, context: int, steps: int) -> Iterator[int]:
        """Continue a cached text."""
        if context not in self.states:
            self.prefill(context)
            self.states[context] = self.model.save_state()
        self.model.load_state(self.states[context])
        token = self.ids[0]
        for _ in range(steps):
            token = self._next([token])
            yield token

    def batch(self, rows: int, steps: int) -> None:
        """Never called: see `batches`."""
        raise NotImplementedError

    def logits(self) -> Any:
        """Those of the last token, (V,), as NumPy sees llama.cpp's own memory."""
        import numpy as np

        return np.ctypeslib.as_array(self.model._ctx.get_logits(), shape=(self.model.n_vocab(),))

    def _next(self, ids: list[int]) -> int:
        self.model.eval(ids)
        return int(self.logits().argmax())
