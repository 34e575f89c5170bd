"""Train small Llamas from scratch, one for each kernel and seed, to see which attention learns better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyllama.attention import Kernel
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.lab.perplexity import text_nll
from tinyllama.lab.training.folder import is_begun, keep, resumed
from tinyllama.lab.training.steps import Schedule, require_window, saved_bytes, step, windows
from tinyllama.model import Llama

STD = 0.02


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for all kernels.

    Attributes:
        text: a digest of what is read; another text is another experiment.
        steps: of the optimizer.
        batch: windows in a step.
        length: tokens in a window.
        lr: the largest learning rate.
        warm_up: steps until it is reached.
        decay: of the matrices, by AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).
        accumulate: in how many parts the windows of a step are read.
        autocast: "bfloat16", or None for float32.
        looks: how often the held-out text is read on the way.
        compiled: by torch.compile; the bits are then others.
    """

    text: str = ""
    steps: int = 400
    batch: int = 8
    length: int = 128
    lr: float = 2e-3
    warm_up: int = 20
    decay: float = 0.1
    accumulate: int = 1
    autocast: str | None = None
    looks: int = 8
    compiled: bool = False

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.steps * self.batch * self.length


@dataclass(frozen=True)
class Run:
    """One kernel trained with one seed.

    Attributes:
        kernel: its name.
        seed: of the first weights and of the windows.
        losses: of each step, in nats a token.
        held_out: pairs of the steps done and the mean -log p of held-out text then.
        saved_bytes: of activations that a step keeps for its backward pass.
    """

    kernel: str
    seed: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    saved_bytes: int


def shape(size: int, vocab_size: int, context: int) -> LlamaConfig:
    """The smallest Llama of the usual proportions with at least that many parameters; the head is tied."""
    for C in range(64, 4096, 64):
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=C,
            intermediate_size=round(C * 8 / 3 / 32) * 32,
            num_hidden_layers=max(2, C // 48),
            num_attention_heads=C // 32,
            num_key_value_heads=C // 64,
            head_dim=32,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        if sum(config.parameters.values()) >= size:
            return config
    raise InputError(f"--size: expected fewer than {sum(config.parameters.values()):,}, got {size:,}")


def untrained(config: LlamaConfig, seed: int) -> Llama:
    """A model with the first weights of a seed: the same for every kernel (GPT-2's, Radford et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    residual = STD / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # norms keep their ones
                std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else STD
                parameter.normal_(0, std, generator=generator)
    return model


def train(
    model: Llama,
    name: str,
    kernel: Kernel,
    text: Tensor,
    held_out: Sequence[int],
    recipe: Recipe,
    seed: int,
    folder: Path | None = None,
) -> Iterator[Run]:
    """Train a model in place; yields what is known after every step, beginning with what was resumed.

    Args:
        model: with its first weights.
        name: the kernel's.
        kernel: attends in all layers.
        text: ids to learn from.
        held_out: ids on which the loss is measured.
        recipe: how.
        seed: of the windows.
        folder: where the state is kept each time the held-out text is read, and found again; None: nowhere.

    Raises:
        InputError: a text is too short, the kernel has weights, or the folder belongs to another experiment.
    """
    require_window(len(text), recipe.length)
    if len(held_out) < 2:
        raise InputError(
            f"text: expected 2 tokens or more to measure on, got {len(held_out)}; give a longer text"
        )
    if isinstance(kernel, nn.Module) and any(True for _ in kernel.parameters()):
        raise InputError(f"{name}: a kernel with weights cannot be trained from scratch; heal.py trains them")
    model.set_attention(kernel)
    weights = dict(model.named_parameters())
    matrices = [one for one in weights.values() if one.dim() > 1]
    others = [one for one in weights.values() if one.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    schedule = Schedule(recipe.lr, recipe.steps, recipe.warm_up)
    autocast = None if recipe.autocast is None else getattr(torch, recipe.autocast)
    experiment = {"recipe": asdict(recipe), "kernel": name, "seed": seed}
    together = math.ceil(recipe.batch / recipe.accumulate)
    run = Run(name, seed, (), (), saved_bytes(model, windows(text, together, recipe.length, 0, 0), autocast))
    if recipe.compiled:
        model.compile()
    if folder is not None and is_begun(folder):
        kept = resumed(folder, model, optimizer, experiment)
        run = Run(name, seed, *kept, run.saved_bytes)
        yield run
    looks = {round(recipe.steps * n / recipe.looks) for n in range(1, recipe.looks + 1)}
    while (number := len(run.losses)) < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(number)
        rows = windows(text, recipe.batch, recipe.length, seed, number)
        loss = step(model, optimizer, rows, accumulate=recipe.accumulate, autocast=autocast)
        run = replace(run, losses=(*run.losses, loss))
        if number + 1 in looks:
            seen = text_nll(model, held_out, recipe.length).mean().item()
            run = replace(run, held_out=(*run.held_out, (number + 1, seen)))
            if folder is not None:
                known = {"losses": run.losses, "held_out": run.held_out}
                keep(folder, model, optimizer, experiment, known)
        yield run
