"""Tables of results: aligned, complete, and nothing where nothing was measured."""

from __future__ import annotations

import math

from lrquant.measures.rows import table
from lrquant.measures.tables import results_table

SCORES = {"quantized": 13.456, "full_precision": 5.6789, "round_to_nearest": 2137.0, "text": "t"}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_columns_line_up():
    text = table(["name", "x"], [["a", "1"], ["a longer name", "12345"]])
    head, rule, *rows = text.splitlines()
    assert len({len(line) for line in text.splitlines()}) == 1
    assert rows[0] == "| a             |     1 |" and rows[1] == "| a longer name | 12345 |"
    assert cells(head) == ["name", "x"]
    assert cells(rule)[0].strip("-") == "" and cells(rule)[1].endswith("-:")


def test_a_table_without_rows_has_its_head():
    assert table(["a", "b"], []).splitlines()[0] == "| a | b |"


def test_one_row_a_set_and_one_column_a_variant_in_fixed_order():
    perplexity = {"wikitext2": SCORES, "c4": {"quantized": 14.0, "full_precision": 7.0}}
    head, _, wikitext2, c4 = results_table({"scheme": "W4A4", "perplexity": perplexity}).split("\n")
    assert cells(head) == ["perplexity, W4A4", "full precision", "round-to-nearest", "LRQuant"]
    assert cells(wikitext2) == ["wikitext2", "5.679", "2137.00", "13.46"]
    assert cells(c4) == ["c4", "7.000", "", "14.00"]


def test_variants_that_were_not_measured_have_no_column():
    scores = {"wikitext2": {"quantized": 13.0, "text": "t"}}
    head = results_table({"scheme": "W4A4", "perplexity": scores}).split("\n")[0]
    assert cells(head) == ["perplexity, W4A4", "LRQuant"]


def test_nothing_measured_is_an_empty_text():
    assert results_table({"scheme": "W4A4", "perplexity": {}}) == ""
    assert results_table({"scheme": "W4A4"}) == ""


def test_large_numbers_keep_their_differences():
    values = {"a": 50121.0, "b": 50204.0, "c": 123456789012.0, "d": math.inf, "e": math.nan}
    scores = {name: {"quantized": value} for name, value in values.items()}
    _, _, *rows = results_table({"scheme": "W2A2", "perplexity": scores}).split("\n")
    assert [cells(row)[1] for row in rows] == ["50121", "50204", "1.2346e+11", "inf", "nan"]
