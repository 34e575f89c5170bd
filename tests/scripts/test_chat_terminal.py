"""Replies at a terminal: no line is too long, no word is cut that fits, and no character is lost."""

import shutil

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tinyllama.cli.chat_terminal import Wrapped

WORDS = st.lists(st.text(st.sampled_from("abcdefg你好世界é"), min_size=1, max_size=12), max_size=12)


def written(pieces, width):
    out = []
    show = Wrapped(out.append, width)
    for piece in pieces:
        show(piece)
    show.flush()
    return "".join(out)


@given(WORDS, st.integers(12, 40), st.randoms(use_true_random=False))
def test_words_wrap_whole(words, width, random):
    text = " ".join(words)
    cuts = sorted(random.choices(range(len(text) + 1), k=5))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    shown = written(pieces, width)
    assert all(cell_len(line) <= width for line in shown.split("\n"))
    assert "".join(shown.split()) == "".join(text.split())
    narrow = [word for word in words if cell_len(word) == len(word) < width]
    assert set(narrow) <= {part for line in shown.split("\n") for part in line.split(" ")}


def test_lines_of_the_text_stay_and_a_word_longer_than_a_line_is_cut():
    assert written(["a\n", "b c"], 20) == "a\nb c"
    assert written(["x" * 25], 10) == "\n".join(["x" * 10, "x" * 10, "x" * 5])
    assert written(["你好世界"], 5) == "你好\n世界"
    assert written(["one two"], shutil.get_terminal_size().columns) == "one two"
