"""Words of the lab's reports: settings are exact, Markdown shows what was meant, columns are aligned."""

from __future__ import annotations

import pytest

from vit_cls.lab.results import LabResult, Table
from vit_cls.reports.lab_words import (
    MOST_LISTED,
    clean,
    escape_markdown,
    facts,
    finding_facts,
    lab_text,
    table_cells,
)
from vit_cls.stats.verdicts import Finding


def test_settings_are_flat_exact_and_not_endless():
    found = dict(
        facts(
            {"a": {"b": {"c": 1e-3}, "d": {}}, "n": 100000, "l": list(range(100)), "t": True, "u": [[1, 2]]}
        )
    )
    assert found["a.b.c"] == "0.001"
    assert found["n"] == "100000"
    assert found["l"].endswith(f"{MOST_LISTED - 1}, and {100 - MOST_LISTED} more in results.json")
    assert (found["t"], found["u"], found["a.d"]) == ("True", "[1, 2]", "none")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cls is better by 0.5 points, p < 0.05", "cls is better by 0.5 points, p < 0.05"),
        ("a [link](http://x) `code` ![i](x)", r"a \[link\](http://x) \`code\` !\[i\](x)"),
        ("# no heading", r"\# no heading"),
        ("1. no list", r"1\. no list"),
        ("- no list", r"\- no list"),
        ("&lt;", "&amp;lt;"),
        ("two\nlines", "two lines"),
        ("snake_case __init__", r"snake_case \_\_init\_\_"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text, shown):
    assert escape_markdown(text) == shown


NUMBERS = {"estimate": 0.012, "ci95": (0.004, 0.02), "p": 0.03, "margin": 0.01, "smallest_detectable": 0.0085}


@pytest.mark.parametrize(
    ("unit", "null", "expected"),
    [
        (
            "points",
            0.0,
            [
                ("estimate", "+1.20 points, 95 % interval +0.40 to +2.00"),
                ("p of no difference", "0.0300"),
                ("margin", "1.00 points"),
                ("smallest detectable", "0.85 points, with a power of 80 %"),
            ],
        ),
        (
            "points per doubling",
            -0.01,
            [
                ("estimate", "+1.20 points per doubling, 95 % interval +0.40 to +2.00"),
                ("p of a difference of -1.00 points per doubling", "0.0300"),
                ("margin", "1.00 points per doubling"),
                ("smallest detectable", "0.85 points per doubling, with a power of 80 %"),
            ],
        ),
        (
            "of cosine",
            0.95,
            [
                ("estimate", "+0.012 of cosine, 95 % interval +0.004 to +0.02"),
                ("p of a difference of +0.95 of cosine", "0.0300"),
                ("margin", "0.01 of cosine"),
                ("smallest detectable", "0.0085 of cosine, with a power of 80 %"),
            ],
        ),
    ],
)
def test_numbers_of_a_finding_are_written_in_its_unit(unit, null, expected):
    assert finding_facts(Finding("c", "supported", "s", **NUMBERS, unit=unit, null=null)) == expected


def test_a_long_label_does_not_touch_its_number():
    finding = Finding("c", "supported", "s", p=0.5, null=0.95, unit="of cosine", counts={"images": 3})
    lines = lab_text(LabResult("k", "q", "h", [finding])).splitlines()
    assert lines[-2:] == [
        " " * 13 + "p of a difference of +0.95 of cosine  0.5000",
        " " * 13 + "counts                                3 images",
    ]


def test_numbers_of_a_column_have_the_same_decimals_unless_their_sizes_differ_much():
    cells, texts = table_cells(Table("t", ["a", "b", "c"], [[0.5, 1e-5, True], [0.125, 20_000.0, None]]))
    assert cells == [["0.500", "1e-05", "yes"], ["0.125", "20,000", "-"]]
    assert texts == [False, False, True]


def test_clean_leaves_what_any_file_can_hold():
    for text in ("a\x00b", "\ud800", "\ufffe", "tab\tnew\nline"):
        assert clean(text).isprintable()
        clean(text).encode("utf-8")
    assert clean("중文 é 🐱") == "중文 é 🐱"
