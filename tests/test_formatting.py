"""Each kind of number is written in one way."""

from __future__ import annotations

import math

import pytest

from vit_cls.formatting import (
    DASH,
    compact,
    count,
    decimals,
    duration,
    estimate_cell,
    interval,
    p_value,
    percent,
    significant,
    size,
    three_decimals,
)


@pytest.mark.parametrize("write", [count, decimals, percent, significant, duration])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_there_or_not_finite_is_a_dash(write, value):
    assert write(value) == DASH


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (9999.4, "9999"), (10_000.0, "10,000"), (10**7, "10,000,000"), (-0.5, "-0.5")],
)
def test_numbers_of_five_digits_on_have_their_thousands_apart(value, text):
    assert significant(value) == text


def test_a_sign_is_written_where_asked():
    assert significant(0.5, signed=True) == "+0.5"
    assert significant(20_000, signed=True) == "+20,000"
    assert percent(0.015, 2, unit=" points", signed=True) == "+1.50 points"
    assert decimals(-0.25, 2, signed=True) == "-0.25"
    assert (decimals(0.93214), percent(0.93214), count(12345)) == ("0.9321", "93.2 %", "12,345")


def test_an_interval_is_written_as_its_estimate_is():
    assert interval((0.5, 0.75)) == "95 % interval 0.5000 to 0.7500"
    assert interval((0.5, 0.75), percent) == "95 % interval 50.0 % to 75.0 %"
    assert estimate_cell(0.6, (0.5, 0.75), three_decimals) == "0.600 [0.500, 0.750]"


@pytest.mark.parametrize(("p", "text"), [(1.0, "1.0000"), (1e-4, "0.0001"), (0.99e-4, "< 0.0001")])
def test_a_tiny_p_value_is_a_bound(p, text):
    assert p_value(p) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min")],
)
def test_a_duration_has_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (1.5e9, "1.5 GB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_a_size_has_three_digits_and_the_unit_that_suits_it(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(("value", "text"), [(9999, "9999"), (10_000, "10k"), (1e6, "1M"), (2.5e9, "2.5G")])
def test_a_number_on_an_axis_is_short(value, text):
    assert compact(value) == text
