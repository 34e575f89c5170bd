"""How figures are written at a terminal, in heal.py and on the page."""

import pytest

from tinyllama.lab.perplexity import Perplexity
from tinyllama.lab.tables import change, grouped, percent, shades, shortened, times


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.0, "+0.0%"),
        (0.99999, "+0.0%"),  # never -0.0%
        (0.9, "-10.0%"),
        (1.0312, "+3.1%"),
        (1.9994, "+99.9%"),
        (2.25, "+125%"),
        (9.99, "+899%"),
        (10.04, "×10.0"),
        (162.6, "×163"),
        (5289.7, "×5,290"),
        (1e9, "×1.0e+09"),
    ],
)
def test_a_ratio_is_a_change_in_percent_or_from_ten_on_a_factor(ratio, expected):
    assert percent(ratio) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (11.284, "11.28"),
        (1.0, "1.000"),
        (999.94, "999.9"),
        (1843.2, "1,843"),
        (59690.0, "59,690"),
        (2e7, "2.0e+07"),
    ],
)
def test_a_perplexity_has_four_digits_or_is_whole(value, expected):
    assert grouped(value) == expected


def test_a_change_has_its_interval_if_there_is_one():
    assert change(Perplexity(2.0, 3.0, 1.5, 1.25, 12.0)) == "+50.0% (+25.0% to ×12.0)"
    assert change(Perplexity(2.0, 3.0, 1.5, None, None)) == "+50.0%"


def test_a_head_is_one_character_and_only_zero_is_a_blank():
    assert shades([0.0, 1e-9, 0.19, 0.21, 0.5, 0.79, 1.0, 7.0]) == " ··░▒▓██"


def test_a_text_is_one_line_without_control_characters():
    assert shortened("a\nb\x1b[31m") == "a⏎b\\x1b[31m"
    assert shortened("x" * 61) == "x" * 59 + "…"
    assert times(None) == "none"
    assert times(1.204) == "1.20×"
