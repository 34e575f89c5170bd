"""What a terminal can show of a session: the tokens, the strongest heads for the last one, and one map."""

from __future__ import annotations

from rich.table import Column, Table
from rich.text import Text

from tinyllama.explorer import views
from tinyllama.explorer.session import Session
from tinyllama.progress import TableConsole, escape
from tinyllama.text.pieces import characters

SHADES = " ·░▒▓█"
WIDEST = 64  # tokens in a map of characters


def show(session: Session) -> None:
    """Print three tables."""
    console, recording = TableConsole(), session.branches[0].recording
    config, last = session.model.config, len(recording.ids) - 1
    numbers = [Column(name, justify="right") for name in ("position", "id")]
    table = Table(*numbers, "text", Column("surprise", justify="right"), "expected next")
    for position, token in enumerate(views.tokens(recording, session.tokenizer)):
        surprise = "" if token["surprise"] is None else f"{token['surprise']:.2f}"
        expected = "  ".join(f"‘{escape(word)}’ {p:.0%}" for _, word, p in token["next"][:3])
        cells = str(position), str(token["id"]), escape(token["text"] or "·"), surprise, expected
        table.add_row(*map(Text, cells))
    console.print(table)

    target = int(recording.passes[-1].top[0][-1, 0])
    parts = views.attribution(recording, last, target)
    adds = [
        (value, layer, head) for layer, heads in enumerate(parts["heads"]) for head, value in enumerate(heads)
    ]
    word = escape(views.text(session.tokenizer, target))
    console.print(Text(f"\nthe heads that add most to the logit of ‘{word}’, {parts['logit']:.2f}"))
    table = Table(*(Column(name, justify="right") for name in ("layer", "head", "adds")), "looks at")
    shown = characters(recording.ids, session.tokenizer)
    adds.sort(reverse=True)
    for value, layer, head in adds[:8]:
        row = views.attention_row(recording, layer, head, last) or []
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:3]
        looks = "  ".join(f"{at} ‘{escape(shown[at][0])}’ {row[at]:.0%}" for at in order)
        table.add_row(str(layer), str(head), f"{value:.2f}", Text(looks or "its kernel shows no pattern"))
    console.print(table)

    _, layer, head = adds[0]
    served = head * config.num_key_value_heads // config.num_attention_heads
    console.print(Text(f"\nlayer {layer}, head {head} (KV head {served}): a row for each query"))
    for query in range(max(last + 1 - WIDEST, 0), last + 1):
        row = views.attention_row(recording, layer, head, query) or []
        shades = "".join(SHADES[min(int(p**0.5 * len(SHADES)), len(SHADES) - 1)] for p in row[-WIDEST:])
        console.print(Text(f"{query:>5} {escape(shown[query][0] or '·')[:12]:<12} {shades}"))
