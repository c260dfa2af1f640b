"""Numbers as people read them: what differs looks different, what is not known is not shown."""

from __future__ import annotations

import math

import pytest

from lrquant.measures.numbers import divergence, number, share, spread


@pytest.mark.parametrize(
    ("write", "values", "words"),
    [
        (number, (50121.0, 50204.0), ("50121", "50204")),
        (number, (2042.77, 5.6789, 6e-5), ("2042.77", "5.679", "6.000e-05")),
        (number, (math.inf, math.nan, "inf", None), ("inf", "nan", "inf", "")),
        (number, (123456789012.0, 454812.4), ("1.2346e+11", "454812")),
        (divergence, (6.0e-05, 1.2e-04), ("6.00e-05", "0.000120")),
        (divergence, (4.3441, 0.25, 0.0, None), ("4.3441", "0.2500", "0", "")),
        (divergence, (math.inf, "nan"), ("inf", "nan")),
        (share, (1.0, 0.99998, 0.5), ("1.0000", "0.99998", "0.5000")),
        (share, (0.0, 2e-5, -1e-6), ("0.0000", "0.00002", "-0.000001")),
        (share, (None, "nan"), ("", "nan")),
    ],
)  # fmt: skip
def test_a_number_keeps_what_differs(write, values, words):
    assert tuple(map(write, values)) == words


def test_an_error_that_is_not_known_is_not_shown_as_none():
    assert spread(0.5, 0.25) == "0.5000 ± 0.2500"
    for error in (None, 0.0, 0, math.nan, "N/A"):
        assert spread(1.0, error) == "1.0000 ± ?"
    assert spread(0.5, 1e-5) == "0.5000 ± 1.0e-05"
    assert spread(50121.0, "N/A") == "50121 ± ?" and spread("nan", 0.1) == "nan"


def test_a_difference_has_its_sign():
    signed = [spread(value, 0.0625, signed=True) for value in (0.25, -0.125, 0.0)]
    assert signed == ["+0.2500 ± 0.0625", "-0.1250 ± 0.0625", "+0.0000 ± 0.0625"]
