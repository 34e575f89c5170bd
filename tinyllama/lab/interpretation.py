"""Classic questions about a trained model, each a few lines over `capture` and `patch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllama.attention import eager
from tinyllama.device import check_memory
from tinyllama.errors import InputError
from tinyllama.hooks import capture, patch
from tinyllama.lab.change import Change
from tinyllama.lab.tables import shades
from tinyllama.model import Llama
from tinyllama.pages.cell import squares, table


@torch.no_grad()
def logit_lens(model: Llama, ids: Sequence[int]) -> Tensor:
    """What each layer would predict if it were the last one (nostalgebraist 2020, "the logit lens").

    The residual stream after the embedding and after every layer goes through the final norm and the head.

    Returns:
        (L + 1, T, V) logits; the last ones are the model's own, to the bit.
    """
    config, batch = model.config, _batch(model, ids)
    needed = (config.num_hidden_layers + 1) * batch.numel() * config.vocab_size
    weight = model.lm_head.weight
    check_memory("the logit lens", needed * weight.dtype.itemsize, weight.device, "give a shorter text")
    with capture(model, "embed_tokens", "layers.*") as residual:
        model.hidden_states(batch)
    return torch.stack([model.lm_head(model.norm(x))[0] for x in residual.values()])


@dataclass(frozen=True)
class Attribution:
    """What each part of a model adds to one logit, or to the difference of two.

    Attributes:
        embedding: what the last token's embedding adds.
        heads: what each head adds, (L, H).
        mlps: what each MLP adds, (L,).
    """

    embedding: Tensor
    heads: Tensor
    mlps: Tensor

    @property
    def total(self) -> Tensor:
        """The sum, which is the logit up to rounding."""
        return self.embedding + self.heads.sum() + self.mlps.sum()


@torch.no_grad()
def direct_logit_attribution(
    model: Llama, ids: Sequence[int], token: int, against: int | None = None
) -> Attribution:
    """Split a token's logit at the last position into what each part of the model adds to it.

    The residual stream is the sum of the embedding, every head's output through its part of o_proj, and every
    MLP's output. The final norm divides it by one number, so the logit is a sum too (Elhage et al. 2021, "A
    Mathematical Framework for Transformer Circuits").

    Args:
        model: the model.
        ids: the text.
        token: the token.
        against: a second token, whose logit is subtracted.
    """
    H, D = model.config.num_attention_heads, model.config.head_dim
    with capture(model, "embed_tokens", "layers.*.self_attn.z", "layers.*.mlp", "layers.*") as values:
        model.hidden_states(_batch(model, ids))
    last = {address: value[0].transpose(0, -2)[-1] for address, value in values.items()}  # (C) or (H, D)
    layers = range(model.config.num_hidden_layers)
    stream = last[f"layers.{layers[-1]}"]
    direction = model.lm_head.weight[token] - (0 if against is None else model.lm_head.weight[against])
    scale = torch.rsqrt(stream.pow(2).mean() + model.norm.eps)
    direction = direction * model.norm.weight * scale  # (C)
    by_head = [attention.o_proj.weight.T.view(H, D, -1) @ direction for attention in model.attentions]
    return Attribution(
        embedding=last["embed_tokens"] @ direction,
        heads=torch.stack([(last[f"layers.{n}.self_attn.z"] * by_head[n]).sum(dim=-1) for n in layers]),
        mlps=torch.stack([last[f"layers.{n}.mlp"] @ direction for n in layers]),
    )


@torch.no_grad()
def activation_patching(
    model: Llama,
    clean: Sequence[int],
    corrupted: Sequence[int],
    metric: Callable[[Tensor], Tensor],
    pattern: str = "layers.*",
) -> Tensor:
    """Find which values carry the difference between two texts.

    Meng et al. 2022 (arXiv:2202.05262), section 2. Runs the corrupted text once for every address and every
    index of the value's second axis (the position of a residual stream, the head of a z), with the value at
    that index taken from the clean run.

    Args:
        model: the model.
        clean: ids of one text.
        corrupted: ids of another text of the same length.
        metric: from logits of the last position to a number, (N, V) -> (N,).
        pattern: the addresses; values (B, T, C) or (B, H, T, D).

    Returns:
        (addresses, positions or heads): the metric after each patch.

    Raises:
        InputError: the texts have different lengths, or `capture` refuses the pattern.
    """
    if len(clean) != len(corrupted):
        raise InputError(
            f"activation_patching: expected texts of one length, got {len(clean)} and {len(corrupted)} tokens"
        )
    with capture(model, pattern) as values:
        model.hidden_states(_batch(model, clean))
    results = []
    for address, value in dict(values).items():
        # All indices in one batch: row n gets the clean value at index n.
        rows = torch.arange(value.shape[1], device=value.device)

        def put(x: Tensor, value: Tensor = value, rows: Tensor = rows) -> Tensor:
            return x.index_put((rows, rows), value[0])

        with patch(model, {address: put}):
            hidden = model.hidden_states(_batch(model, corrupted).expand(len(rows), -1))
        results.append(metric(model.lm_head(hidden[:, -1])))
    return torch.stack(results)


@dataclass(frozen=True)
class HeadScores:
    """How much of its attention each head gives to a place, 0 to 1.

    Attributes:
        previous: to the previous token, (L, H).
        induction: to the token after the last occurrence of the same token, (L, H).
    """

    previous: Tensor
    induction: Tensor

    def __repr__(self) -> str:
        """Each layer with a character for every head, darker for more; the strongest heads first."""
        lines = [f"{name}: {self.strongest(name)}" for name in ("previous", "induction")]
        width = max(len("previous"), self.previous.shape[1])
        lines.append(f"layer  {'previous':<{width}}  induction")
        for layer, parts in enumerate(zip(self.previous.tolist(), self.induction.tolist(), strict=True)):
            previous, induction = map(shades, parts)
            lines.append(f"{layer:>5}  {previous:<{width}}  {induction}".rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A square for every head, for a notebook."""
        title = "; ".join(f"{name}: {self.strongest(name)}" for name in ("previous", "induction"))
        rows = [
            (layer, *(squares({f"layer {layer}, head {h}": p for h, p in enumerate(part)}) for part in parts))
            for layer, parts in enumerate(zip(self.previous.tolist(), self.induction.tolist(), strict=True))
        ]
        return table(title, ("#layer", "previous", "induction"), rows)

    def strongest(self, name: str, count: int = 3) -> str:
        """The heads with the highest scores of that name, in words."""
        values, places = getattr(self, name).flatten().topk(min(count, self.previous.numel()))
        heads = (divmod(place, self.previous.shape[1]) for place in places.tolist())
        pairs = zip(heads, values.tolist(), strict=True)
        return ", ".join(f"layer {layer} head {head} ({value:.2f})" for (layer, head), value in pairs)


@torch.no_grad()
def head_scores(model: Llama, length: int = 64, seed: int = 0) -> HeadScores:
    """Find previous-token and induction heads (Olsson et al. 2022, arXiv:2209.11895).

    The text is random and repeated once: only copying predicts its second half, in which an induction head
    attends from each token to the one that followed it the first time.

    Args:
        model: the model; meanwhile it attends by the textbook kernel, which has patterns.
        length: tokens of the text before it is repeated.
        seed: of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
    with Change("eager", eager).applied(model), capture(model, "layers.*.self_attn.pattern") as patterns:
        model.hidden_states(_batch(model, ids + ids))
    pattern = torch.stack([value[0] for value in patterns.values()])  # (L, H, T, T)
    second = range(length, 2 * length)
    return HeadScores(
        previous=torch.stack([pattern[:, :, i, i - 1] for i in second]).mean(dim=0),
        induction=torch.stack([pattern[:, :, i, i - length + 1] for i in second]).mean(dim=0),
    )


def _batch(model: Llama, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.embed_tokens.weight.device)
