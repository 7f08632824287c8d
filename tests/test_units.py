"""Sizes and times in words: in a unit that suits, and never as nothing of one that is too large."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hass_core.units import size_words, time_words


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "0 B"),
        (999.4, "999 B"),
        (999.6, "1.0 kB"),
        (3_400, "3.4 kB"),
        (9_960, "10 kB"),
        (999_600, "1.0 MB"),
        (12_400_000, "12 MB"),
        (181e9, "181 GB"),
        (1.23e18, "1,230 PB"),
    ],
)
def test_a_size_has_the_unit_that_suits(size, says):
    assert size_words(size) == says


@given(st.floats(min_value=1, max_value=1e17))
def test_a_size_in_words_is_the_size_to_two_digits(size):
    number, unit = size_words(size).split()
    amount = float(number.replace(",", "")) * 1000 ** ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert abs(amount / size - 1) <= (0.5 if size < 2 else 0.3 if size < 10 else 0.052)
    assert float(number.replace(",", "")) > 0


@pytest.mark.parametrize(
    ("seconds", "says"), [(40, "40 s"), (89, "89 s"), (720, "12 minutes"), (7_560, "2.1 hours"), (4e5, "111 hours")]
)
def test_a_time_has_the_unit_that_suits(seconds, says):
    assert time_words(seconds) == says
