"""A low-rank cache: of each token a few numbers a layer, from which its key and value are made again.

As in multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.1.2), the key is
kept before RoPE, which would spoil the low rank: it turns each token's key by another angle. There the model
is trained so; here the directions are those in which a trained model's keys and values vary most.

    python scripts/lab.py docs/kernels/low_rank.py:attend:rank=192 --model smollm2
"""

from pathlib import Path

import torch

import tinyllama
from tinyllama.lab import breaks, keeps
from tinyllama.lab.variants import without_rope
from tinyllama.parity import texts
from tinyllama.rope import rotate

MODEL = "smollm2"  # give lab.py the same
MEASURED = 1024  # tokens of the English text that lab.py reads: the directions come from what follows


def principal_directions() -> list[torch.Tensor]:
    """Of each layer, orthonormal columns (2KD, 2KD): its keys and values vary most along the first ones."""
    model, tokenizer = tinyllama.load(MODEL, device="cpu", dtype="float32")
    rows: list[list[torch.Tensor]] = [[] for _ in model.layers]
    code = Path(tinyllama.__file__).with_name("model.py").read_text(encoding="utf-8")
    for ids in (tokenizer.encode(texts.read("english"))[MEASURED:], tokenizer.encode(code)):
        with torch.no_grad(), tinyllama.capture(model, "layers.*.self_attn.?_proj") as values:
            model.hidden_states(torch.tensor([ids]))
        for layer, own in enumerate(rows):
            k, v = (values[f"layers.{layer}.self_attn.{name}_proj"][0] for name in "kv")  # before RoPE
            own.append(torch.cat((k, v), dim=-1))
    return [torch.linalg.svd(torch.cat(own), full_matrices=False).Vh.T for own in rows]


DIRECTIONS = principal_directions()


def latent(k, v, context, *, rank=192):
    """What is kept: `rank` numbers of each token, (B, S, rank)."""
    k = without_rope(k, context.mask.key_positions, context)
    x = torch.cat((k, v), dim=1).transpose(1, 2).flatten(2)  # (B, S, 2KD)
    return (x @ DIRECTIONS[context.layer][:, :rank].to(x),)


@breaks("groups")  # all KV heads share what is kept
@keeps(latent)
def attend(q, kept, context, *, rank=192):
    """Attention to the keys and values that are made from what was kept."""
    x = kept[0] @ DIRECTIONS[context.layer][:, :rank].to(q).T  # (B, S, 2KD)
    k, v = x.unflatten(2, (-1, q.shape[-1])).transpose(1, 2).chunk(2, dim=1)  # each (B, K, S, D)
    k = rotate(k, *context.mask.rotary(context.mask.key_positions, k.dtype))
    return tinyllama.sdpa(q, k, v, context)
