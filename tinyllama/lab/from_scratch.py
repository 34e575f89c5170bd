"""Train small Llamas from scratch, one for each kernel and seed, to see which attention learns better."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from tinyllama.attention import Kernel
from tinyllama.checkpoints.files import SINGLE, read_json, replace_file, replace_text
from tinyllama.config import LlamaConfig
from tinyllama.errors import InputError
from tinyllama.kernels import kernel_name
from tinyllama.lab.perplexity import text_nll
from tinyllama.lab.training import Schedule, moments, restore, step, windows
from tinyllama.model import Llama

END = "<|endoftext|>"
STD = 0.02
# Student's t, 97.5%, by degrees of freedom (Student 1908); more seeds than that take the last.
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
TIMED_AFTER = 5  # steps that warm caches up are not timed


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for all kernels.

    Attributes:
        steps: of the optimizer.
        batch: windows in a step.
        length: tokens in a window.
        lr: the largest learning rate.
        warm_up: steps until it is reached.
        decay: of the matrices, by AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).
        accumulate: in how many parts the windows of a step are read.
        autocast: "bfloat16", or None for float32.
        looks: how often the held-out text is read on the way.
    """

    steps: int = 400
    batch: int = 8
    length: int = 128
    lr: float = 2e-3
    warm_up: int = 20
    decay: float = 0.1
    accumulate: int = 1
    autocast: str | None = None
    looks: int = 8

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
        tokens_per_second: of training, the first steps left out; 0 before there are others.
        bytes: the most memory that the process has held so far.
    """

    kernel: str
    seed: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    tokens_per_second: float
    bytes: int


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


def byte_tokenizer(text: str, vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer on a text, and write it as a checkpoint keeps it."""
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([text], trainer)
    trained.save(str(folder / "tokenizer.json"))
    kept = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "add_prefix_space": False}
    replace_text(folder / "tokenizer_config.json", json.dumps(kept, indent=1) + "\n")


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
    """Train a model in place, and yield what is known after every step, and at once what was resumed.

    Args:
        model: with its first weights.
        name: the kernel's.
        kernel: attends in all layers.
        text: ids to learn from.
        held_out: ids on which the loss is measured.
        recipe: how.
        seed: of the windows.
        folder: where the state is kept at each look, and found again; None: nowhere.
    """
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
    run = Run(name, seed, (), (), 0.0, 0)
    if folder is not None and (folder / STATE).exists():
        run = _resumed(folder, optimizer, weights, recipe, run)
        yield run
    looks = {round(recipe.steps * n / recipe.looks) for n in range(1, recipe.looks + 1)}
    spent, begun = 0.0, len(run.losses)
    while (number := len(run.losses)) < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(number)
        rows = windows(text, recipe.batch, recipe.length, seed, number)
        start = time.perf_counter()
        loss = step(model, optimizer, rows, accumulate=recipe.accumulate, autocast=autocast)
        if number >= begun + TIMED_AFTER:
            spent += time.perf_counter() - start
        seen = run.held_out
        if number + 1 in looks:
            seen = (*seen, (number + 1, text_nll(model, held_out, recipe.length).mean().item()))
        timed = number + 1 - begun - TIMED_AFTER
        speed = timed * recipe.batch * recipe.length / spent if spent else run.tokens_per_second
        run = Run(name, seed, (*run.losses, loss), seen, speed, _most_memory())
        if folder is not None and number + 1 in looks:
            _keep(folder, run, recipe, model, weights, moments(optimizer, weights))
        yield run


@dataclass(frozen=True)
class Finding:
    """A kernel beside the first one, at equal tokens.

    Attributes:
        kernel: its name.
        loss: mean over seeds of the final held-out loss, in nats a token.
        worse: by how much its loss is above the first one's, as a share, paired by seed.
        margin: half of the 95% interval of that, by Student's t; None with one seed.
        faster: tokens a second over the first one's, less 1.
    """

    kernel: str
    loss: float
    worse: float
    margin: float | None
    faster: float

    def __str__(self) -> str:
        """A verdict in plain words."""
        share = f"{abs(self.worse):.1%}" + ("" if self.margin is None else f" ± {self.margin:.1%}")
        if self.margin is not None and abs(self.worse) <= self.margin:
            learns = f"learns as well, as far as these seeds tell ({self.worse:+.1%} ± {self.margin:.1%})"
        else:
            learns = f"learns {share} {'worse' if self.worse > 0 else 'better'} at equal tokens"
        return f"{self.kernel} {learns}, {abs(self.faster):.0%} {'faster' if self.faster > 0 else 'slower'}"


def findings(runs: Mapping[str, Sequence[Run]]) -> list[Finding]:
    """Every kernel beside the first one; runs by kernel, each in the order of the seeds."""
    first, *_ = runs.values()
    found = []
    for kernel, own in runs.items():
        shares = [
            mine.held_out[-1][1] / base.held_out[-1][1] - 1 for mine, base in zip(own, first, strict=True)
        ]
        margin = None
        if len(shares) > 1:
            t = T975[min(len(shares) - 2, len(T975) - 1)]
            margin = t * statistics.stdev(shares) / math.sqrt(len(shares))
        speeds = [statistics.median(run.tokens_per_second for run in some) for some in (own, first)]
        found.append(
            Finding(
                kernel,
                statistics.mean(run.held_out[-1][1] for run in own),
                statistics.mean(shares),
                margin,
                speeds[0] / speeds[1] - 1 if speeds[1] else 0.0,
            )
        )
    return found


# --- files ------------------------------------------------------------------------------------------------

STATE = "training.json"  # written last: what it tells of is there
MEANS = "optimizer.safetensors"
PLAIN = ("sdpa", "eager")  # of these the checkpoint says nothing: every Llama attends so


def _keep(
    folder: Path,
    run: Run,
    recipe: Recipe,
    model: Llama,
    weights: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint folder's files, each by rename, and what resuming needs."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        **{name: value for name, value in asdict(model.config).items() if value is not None},
    }
    name = kernel_name(model.attentions[0].kernel)
    if name not in PLAIN:
        config["attention_kernel"] = name
    named = {
        key if key.startswith("lm_head") else f"model.{key}": value.detach().contiguous()
        for key, value in weights.items()
    }
    replace_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    replace_file(folder / SINGLE, lambda part: save_file(named, part, {"format": "pt"}))
    replace_file(folder / MEANS, lambda part: save_file(dict(means), part))
    replace_text(folder / STATE, json.dumps({"recipe": asdict(recipe), "run": asdict(run)}) + "\n")


def _resumed(
    folder: Path,
    optimizer: torch.optim.AdamW,
    weights: Mapping[str, nn.Parameter],
    recipe: Recipe,
    begun: Run,
) -> Run:
    """Put everything back as it was at the latest look; raises InputError for another experiment."""
    kept = read_json(folder / STATE)
    if kept.get("recipe") != asdict(recipe) or kept["run"]["kernel"] != begun.kernel:
        raise InputError(f"{folder}: was trained in another way; give another --out, or the same options")
    saved = load_file(folder / SINGLE)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(saved[name if name.startswith("lm_head") else f"model.{name}"])
    run = kept["run"]
    restore(optimizer, weights, load_file(folder / MEANS), len(run["losses"]))
    looks = tuple((int(steps), float(loss)) for steps, loss in run["held_out"])
    return Run(begun.kernel, begun.seed, tuple(run["losses"]), looks, run["tokens_per_second"], run["bytes"])


def _most_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
