"""Scheme names and what they mean."""

from __future__ import annotations

import pytest

from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.errors import LRQuantError


@pytest.mark.parametrize(
    "name, expected",
    [
        ("W4A4", Scheme(4, 4)),
        ("w4a16g128", Scheme(4, 16, 128)),
        (" W3A16g64 ", Scheme(3, 16, 64)),
        ("W8A8-sym", Scheme(8, 8, symmetric=True)),
        ("W4A16g32-sym", Scheme(4, 16, 32, symmetric=True)),
        ("W4A4-asym", Scheme(4, 4)),
        ("W4A4-qkv16", Scheme(4, 4, qkv_bits=16)),
        ("W4A16g128-sym-qkv8", Scheme(4, 16, 128, symmetric=True, qkv_bits=8)),
        ("W4A4-ag64", Scheme(4, 4, activation_group_size=64)),
        ("W4A8g32-sym-ag64-qkv16", Scheme(4, 8, 32, True, False, 16, activation_group_size=64)),
        ("W16A16", FLOATING_POINT),
    ],
)
def test_parse(name, expected):
    assert Scheme.parse(name) == expected


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("qkv_bits", [None, 8, 16])
@pytest.mark.parametrize("across", [None, 32])
def test_name_reads_back(group_size, symmetric, qkv_bits, across):
    scheme = Scheme(3, 4, group_size, symmetric, qkv_bits=qkv_bits, activation_group_size=across)
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize(
    "name",
    [
        *("", "W4", "A4", "4A4", "W4A4g", "W4A4 g128", "W4A4-symm", "W4A4-sym-asym"),
        *("W4A4-ag", "W4A4-qkv16-ag8"),
        *("W4A4-qkv", "W-4A4", "W4.5A4", "W4A4g128x", "W4A16g-1", "xW4A4"),
    ],
)
def test_parse_refuses_and_gives_an_example(name):
    with pytest.raises(LRQuantError, match="for example W4A4"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("W1A16", "weight bits 1"),
        ("W9A16", "weight bits 9"),
        ("W0A4", "weight bits 0"),
        ("W4A1", "activation bits 1"),
        ("W4A12", "activation bits 12"),
        ("W4A32", "activation bits 32"),
        ("W4A4-qkv1", "Q/K/V bits 1"),
        ("W4A4-qkv0", "Q/K/V bits 0"),
        ("W4A16g0", "group size 0"),
        ("W4A4-ag0", "activation group size 0"),
        ("W4A16-ag64", "activation group size 64 with 16-bit activations"),
    ],
)
def test_impossible_numbers_are_named(name, words):
    with pytest.raises(LRQuantError, match=words):
        Scheme.parse(name)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_possible_bits(bits):
    assert Scheme(bits, bits).name == f"W{bits}A{bits}"


def test_a_negative_group_size_is_refused():
    with pytest.raises(LRQuantError, match="group size -1"):
        Scheme(group_size=-1)


@pytest.mark.parametrize(
    "name, attention_bits, weight_only, floating_point",
    [
        ("W4A4", 4, False, False),
        ("W4A16", 16, True, False),
        ("W4A4-qkv16", 16, False, False),
        ("W4A16-qkv4", 4, False, False),
        ("W16A4", 4, False, False),
        ("W16A16", 16, True, True),
        ("W16A16-qkv8", 8, False, False),
    ],
)
def test_what_stays_in_floating_point(name, attention_bits, weight_only, floating_point):
    scheme = Scheme.parse(name)
    assert scheme.attention_bits == attention_bits
    assert scheme.weight_only == weight_only
    assert scheme.floating_point == floating_point


def test_describe_says_what_is_quantised_and_how():
    text = Scheme.parse("W4A16g128-sym-qkv8").describe()
    assert text.startswith("W4A16g128-sym-qkv8: ")
    for words in ("4 bits, symmetric, groups of 128", "activations floating point", "V 8 bits"):
        assert words in text


@pytest.mark.parametrize("name", ["W4A4g" + "9" * 5000, "W" + "9" * 5000 + "A4", "W٤A4"])
def test_absurd_names_are_refused(name):
    with pytest.raises(LRQuantError, match="expected W<bits>A<bits>"):
        Scheme.parse(name)
