"""Words of the lab's reports: settings are exact, numbers have their unit, columns have like decimals."""

from __future__ import annotations

import pytest

from vit_cls.lab.results import Table
from vit_cls.reports.text import clean
from vit_cls.reports.words import MOST_LISTED, facts, finding_facts, table_cells
from vit_cls.stats.verdicts import Finding


def test_settings_are_flat_exact_and_not_endless():
    given = {"a": {"b": {"c": 1e-3}, "d": {}}, "n": 100000, "l": list(range(100)), "t": True, "u": [[1, 2]]}
    found = dict(facts(given))
    assert found["a.b.c"] == "0.001"
    assert found["n"] == "100000"
    assert found["l"].endswith(f"{MOST_LISTED - 1}, and {100 - MOST_LISTED} more in results.json")
    assert (found["t"], found["u"], found["a.d"]) == ("True", "[1, 2]", "none")


@pytest.mark.parametrize(
    ("unit", "null", "of_null", "written"),
    [
        ("points", 0.0, "no difference", ("+1.20", "+0.40 to +2.00", "1.00", "0.85")),
        (
            "points per doubling",
            -0.01,
            "a difference of -1.00 points per doubling",
            ("+1.20", "+0.40 to +2.00", "1.00", "0.85"),
        ),
        (
            "of cosine",
            0.95,
            "a difference of +0.95 of cosine",
            ("+0.012", "+0.004 to +0.02", "0.01", "0.0085"),
        ),
    ],
)
def test_numbers_of_a_finding_are_written_in_its_unit(unit, null, of_null, written):
    numbers = {"estimate": 0.012, "ci95": (0.004, 0.02), "p": 0.03, "margin": 0.01}
    finding = Finding("c", "supported", "s", **numbers, smallest_detectable=0.0085, unit=unit, null=null)
    estimate, interval, margin, least = written
    assert finding_facts(finding) == [
        ("estimate", f"{estimate} {unit}, 95 % interval {interval}"),
        (f"p of {of_null}", "0.0300"),
        ("margin", f"{margin} {unit}"),
        ("smallest detectable", f"{least} {unit}, with a power of 80 %"),
    ]


def test_numbers_of_a_column_have_the_same_decimals_unless_their_sizes_differ_much():
    cells, texts = table_cells(Table("t", ["a", "b", "c"], [[0.5, 1e-5, True], [0.125, 20_000.0, None]]))
    assert cells == [["0.500", "1e-05", "yes"], ["0.125", "20,000", "-"]]
    assert texts == [False, False, True]
    with pytest.raises(ValueError, match="table 't' must have 2 cells, one a column; got 1"):
        table_cells(Table("t", ["a", "b"], [["x"]]))


def test_clean_leaves_what_any_file_can_hold():
    for text in ("a\x00b", "\ud800", "\ufffe", "tab\tnew\nline"):
        assert clean(text).isprintable()
        clean(text).encode("utf-8")
    assert clean("中文 é 🐱") == "中文 é 🐱"
