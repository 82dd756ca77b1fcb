"""Results on a terminal and in a pipe: the answer first, aligned, whole, and nothing that commands."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from tests.reports.conftest import (
    HOSTILE,
    HOSTILE_CASES,
    comparison_of,
    evaluation_case,
    lab_result,
    predictions_of,
)
from vit_cls.evaluation.comparison import EQUIVALENT
from vit_cls.lab.results import LabResult, Table
from vit_cls.reports.terminal import render, terminal, text
from vit_cls.stats.verdicts import Finding


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", HOSTILE_CASES)
def test_a_hostile_result_is_plain_lines_in_a_pipe(kind):
    shown = text(HOSTILE_CASES[kind]().result)
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    assert not [line for line in shown.split("\n") if line != line.rstrip()]
    shown.encode("utf-8")


def test_a_terminal_gets_its_own_width_and_a_bold_headline(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    shown = render(terminal(lab_result()), _Terminal())
    assert shown.startswith("\x1b[1mcls beats gap\x1b[0m")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= 60
    assert "about 4,300 images of max" in " ".join(plain.split())


def test_what_an_encoding_lacks_is_escaped():
    assert render(["猫 [bold]x[/bold] :cat:"], io.TextIOWrapper(io.BytesIO(), "ascii")) == (
        "\\u732b [bold]x[/bold] :cat:"
    )


def test_nothing_is_cut_in_a_pipe():
    name = "a name that is far longer than any terminal is wide, " * 20
    result = LabResult(
        "k", "q", name.strip(), tables=[Table("t", ["a", "b"], [[name.strip(), name.strip()]])]
    )
    lines = text(result).splitlines()
    assert lines[0] == name.strip()
    assert lines[-1] == f"{name.strip()}  {name.strip()}"


def test_an_evaluation_says_counts_first_and_then_every_metric():
    lines = text(evaluation_case(predictions_of(["cat", "dog", "owl"])).result).splitlines()
    assert re.fullmatch(
        r"\d+ of 120 images right \(0 could not be read; 2 of the model's 3 classes\)", lines[0]
    )
    assert re.fullmatch(r"top-1 +0\.\d{4} +95 % interval 0\.\d{4} to 0\.\d{4}", lines[1])
    assert lines[-1] == "no images of: dog"


def test_a_comparison_opens_with_the_verdict():
    lines = text(comparison_of(["runs/x", "runs/y"])).splitlines()
    assert lines[0] == "Cannot tell runs/x and runs/y apart on 100 images; about 812 would be needed."
    assert lines[1] == "A  80 of 100 images right, top-1 0.8000, 95 % interval 0.7000 to 0.9000: runs/x"
    assert lines[4].endswith("both right 70, only A 8, only B 12, both wrong 10")
    assert lines[5] == "difference B - A      +0.0400   95 % bootstrap interval -0.0500 to +0.1300"
    three = text(comparison_of(["x", "y", "z"], EQUIVALENT))
    assert "adjusted over 3 pairs" in three
    assert three.count("equivalent within the margin of 1 point.") == 3


def test_a_probe_opens_with_the_headline_and_its_findings_and_first_table_are_aligned():
    lines = text(lab_result()).splitlines()
    assert lines[0] == "cls beats gap"
    assert lines[2] == "supported    cls against gap: supported, so it is."
    finding = next(i for i, line in enumerate(lines) if line.startswith("cannot tell"))
    assert lines[finding + 1 : finding + 4] == [
        "             estimate             +0.40 points, 95 % interval -0.90 to +1.70",
        "             p of no difference   0.4100",
        "             p, Holm-adjusted     1.0000",
    ]
    assert lines[-4:] == [
        "Heads cls",
        "head  top-1 (%)  images    ece",
        "cls       93.21   5,400  0.020",
        "gap           -       7  0.123",
    ]
    wide = replace(lab_result(), tables=[Table("t", ["a", "b"], [["中文", 1], ["x", 22]])])
    assert text(wide).splitlines()[-2:] == ["中文   1", "x     22"]
    assert text(LabResult("probe linear", "What?", "Nothing is known.")) == "Nothing is known."


def test_a_long_label_does_not_touch_its_number():
    finding = Finding("c", "supported", "s", p=0.5, null=0.95, unit="of cosine", counts={"images": 3})
    assert text(LabResult("k", "q", "h", [finding])).splitlines()[-2:] == [
        " " * 13 + "p of a difference of +0.95 of cosine  0.5000",
        " " * 13 + "counts                                3 images",
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_on_its_line(name):
    lines = text(comparison_of([name, "other"])).split("\n")
    assert len(lines) == 9
