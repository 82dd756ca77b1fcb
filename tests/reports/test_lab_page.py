"""What a probe or a study leaves behind: the verdict first, everything readable, nothing that breaks."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.reports.outline import Outline
from vit_cls.lab.results import (
    ForestChart,
    HeatMap,
    LabResult,
    Line,
    LineChart,
    Pictures,
    ScatterChart,
    Table,
)
from vit_cls.reports.lab import WIDE_COLUMNS, write_lab_report
from vit_cls.reports.lab_words import lab_text
from vit_cls.stats.verdicts import VERDICTS, Finding

HEADLINE = "max is better than cls by 1.6 points, p < 0.05; the rest cannot be told apart."


def _result(names: list[str] | None = None) -> LabResult:
    """All verdicts, two tables, every kind of figure; names go wherever a name can."""
    a, b, c, *_ = names or ["cls", "gap", "max"]
    findings = [
        Finding(f"{a} and {b} differ: {verdict}", verdict, f"{a} against {b}: {verdict}, so it is.")
        for verdict in VERDICTS
    ]
    findings[3] = replace(
        findings[3],
        estimate=0.004,
        ci95=(-0.009, 0.017),
        p=0.41,
        p_holm=1.0,
        p_equivalence=1e-7,
        margin=0.01,
        smallest_detectable=0.021,
        needed=f"about 4,300 images of {c}",
        counts={"images": 5400, "seeds": 5},
    )
    lines = [Line(f"{name} {i}", [(0, 0.5), (1, math.nan), (2, 0.9)]) for i, name in enumerate([a, b, c] * 2)]
    image = np.full((28, 28, 3), 90, np.uint8)
    figures = [
        LineChart(f"By layer {a}", a, b, lines, marks={c: 0.1}, note=f"note on {a}"),
        ForestChart(f"Difference {a}", [(f"{a} minus {b}", 0.01, (-0.01, 0.03))], 0.01),
        ScatterChart("Cost", "x", "y", [(a, 10, 0.5, (0.4, 0.6)), (b, 1e6, 0.9, None)]),
        HeatMap("Entropy", [[0.5, math.nan]], [a], [b, c]),
        HeatMap("Tokens", [[0.5] * 20] * 3),
        HeatMap("Nothing", [[math.nan]]),
        Pictures(f"Images of {a}", [a, b], [[image, None], [image, image]], [a, c]),
    ]
    wide = [f"{b} column {i} (%)" for i in range(12)]
    tables = [
        Table(
            f"Heads {a}",
            ["head", "top-1 (%)", "images", "ece"],
            [[a, 0.93214, 5400, 0.02], [b, None, 7, 0.123]],
        ),
        Table(
            "Wide", ["head", *wide], [[name, *([0.5] * 12)] for name in (a, b, c)], note=f"{a} is read so."
        ),
    ]
    return LabResult(
        "study heads",
        f"Which of {a}, {b}?",
        HEADLINE if names is None else f"{a} beats {b}",
        findings,
        tables,
        figures,
        settings={"model": {"name": a, "pool": "cls"}, "lr": 1e-3, "grid": list(range(100))},
        data={"root": b, "test": 540, "failed": 0},
        values={"x": math.inf, "seeds": np.arange(3)},
        predictions={"cls": np.array([1.0, math.nan]), "path": [c]},
        notes=[f"{a} was seen once."],
        seconds=61.0,
    )


@pytest.fixture
def written(tmp_path):
    """The folder of a report."""

    def write(result, name="out"):
        folder = tmp_path / name
        files = write_lab_report(folder, result, versions={"vit_cls": "0.1.0"})
        assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
        return folder

    return write


def test_json_holds_everything_and_no_nan(written):
    def refuse(word):
        raise AssertionError(word)

    found = json.loads((written(_result()) / "results.json").read_text("ascii"), parse_constant=refuse)
    assert found["headline"] == HEADLINE
    assert found["predictions"] == {"cls": [1.0, None], "path": ["max"]}
    assert found["values"] == {"x": None, "seeds": [0, 1, 2]}
    assert found["versions"] == {"vit_cls": "0.1.0"}
    assert [one["verdict"] for one in found["findings"]] == list(VERDICTS)
    assert [one["kind"] for one in found["figures"]].count("HeatMap") == 3


def test_the_headline_is_the_first_line_and_the_h1(written):
    folder = written(_result())
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[0] == HEADLINE
    assert set(lines[1]) == {"="}
    page = (folder / "report.html").read_text()
    h1 = re.search(r"<h1>(.*?)</h1>", page)
    assert html.unescape(re.sub("<.*?>", "", h1[1])) == HEADLINE
    words = Outline(page).words
    assert (
        words.index("study heads: Which of cls, gap?")
        < words.index(f"? {HEADLINE}")
        < words.index("Findings")
    )


def test_each_finding_has_its_verdict_in_words_and_its_numbers(written):
    folder = written(_result())
    words = Outline((folder / "report.html").read_text()).words
    for verdict in VERDICTS:
        assert f"{verdict} cls against gap: {verdict}, so it is. Claim: cls and gap differ" in words
    numbers = [
        ("estimate", "+0.40 points, 95 % interval -0.90 to +1.70"),
        ("p of no difference", "0.4100"),
        ("p, Holm-adjusted", "1.0000"),
        ("p of equivalence", "< 0.0001"),
        ("margin", "1.00 points"),
        ("smallest detectable", "2.10 points, with a power of 80 %"),
        ("needed to tell", "about 4,300 images of max"),
        ("counts", "5,400 images, 5 seeds"),
    ]
    assert " ".join(f"{label} {value}" for label, value in numbers) in words
    markdown = (folder / "report.md").read_text()
    assert "\n".join(f"  - {label}: {value}" for label, value in numbers) in markdown
    text = lab_text(_result())
    assert all(re.search(rf"^ +{label} +{re.escape(value)}$", text, re.MULTILINE) for label, value in numbers)


def test_shares_are_percentages_and_none_is_a_dash(written):
    folder = written(_result())
    table = (folder / "report.md").read_text().split("## Heads cls")[1].split("##")[0].strip().splitlines()
    assert table == [
        "| head | top-1 (%) | images | ece |",
        "| :--- | ---: | ---: | ---: |",
        "| cls | 93.21 | 5,400 | 0.020 |",
        "| gap | - | 7 | 0.123 |",
    ]
    assert (
        "head top-1 (%) images ece cls 93.21 5,400 0.020 gap - 7 0.123"
        in Outline((folder / "report.html").read_text()).words
    )


def test_the_text_opens_with_the_headline_and_its_table_is_aligned():
    lines = lab_text(_result()).splitlines()
    assert lines[0] == HEADLINE
    assert lines[2] == "supported    cls against gap: supported, so it is."
    assert lines[-4:] == [
        "Heads cls",
        "head  top-1 (%)  images    ece",
        "cls       93.21   5,400  0.020",
        "gap           -       7  0.123",
    ]
    wide = lab_text(
        replace(_result(), tables=[Table("t", ["a", "b"], [["中文", 1], ["x", 22]])])
    ).splitlines()
    assert wide[-2:] == ["中文   1", "x     22"]


def test_every_figure_is_on_the_page_in_markdown_and_a_file(written):
    folder = written(_result())
    names = [
        "1_by_layer_cls.svg",
        "2_difference_cls.svg",
        "3_cost.svg",
        "4_entropy.svg",
        "5_tokens.svg",
        "7_images_of_cls.png",
    ]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == names
    markdown = (folder / "report.md").read_text()
    assert re.findall(r"\]\(figures/(.*?)\)", markdown) == names
    assert "Nothing: nothing to draw." in markdown
    outline = Outline((folder / "report.html").read_text())
    charts = [attrs["aria-label"] for attrs in outline.all("svg")]
    assert [label.split(":")[0] for label in charts] == [
        "By layer cls",
        "Difference cls",
        "Cost",
        "Entropy",
        "Tokens",
    ]
    assert charts[0].startswith("By layer cls: cls 0 from 50 % at 0 to 90 % at 2; gap 1")
    assert "Nothing Nothing to draw: no value is a number." in outline.words
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    svg = (folder / "figures/1_by_layer_cls.svg").read_text()
    assert "background: #fff" in svg
    assert "var(" not in svg
    assert sum(attrs.get("class") == "scroll whole pan" for attrs in outline.all("div")) == 1  # 20 columns
    assert WIDE_COLUMNS < 20


def test_what_a_chart_leaves_out_is_named(written):
    nan = math.nan
    figures = [
        LineChart("Lines", "x", "y", [Line("cls", [(0, 0.5)]), Line("gap", [(0, nan)])], note="Bands."),
        ForestChart("Forest", [("max", nan, (nan, nan)), ("map", 0.1, (0.0, 0.2))], 0.01),
        ScatterChart("Points", "x", "y", [("gem3", 1, nan, None), ("ep8", 1, 0.5, None)]),
    ]
    folder = written(replace(_result(), figures=figures))
    for text in ((folder / "report.html").read_text(), (folder / "report.md").read_text()):
        missing = re.findall("Not drawn, for lack of a value: (.*?)\\.", text)
        assert missing == ["gap", "max", "gem3"]
        assert "Bands. Not drawn" in text


def test_pictures_have_words_and_keep_their_pixels(written):
    folder = written(_result())
    images = Outline((folder / "report.html").read_text()).all("img")
    assert [image["alt"] for image in images] == ["cls, cls", "max, cls", "max, gap"]
    assert all(image["class"] == "small" and image["width"] == image["height"] == "84" for image in images)
    with Image.open(folder / "figures/7_images_of_cls.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert (pixels == 90).all(axis=2).sum() > 3 * 50**2


def test_series_stand_out_from_the_ground_in_both_schemes(written):
    def luminance(colour):
        digits = "".join(2 * d for d in colour) if len(colour) == 3 else colour
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    themes = re.findall(r":root \{(.*?)\}", (written(_result()) / "report.html").read_text(), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): #(\w+);", theme))
        series = [colours[f"series-{i}"] for i in range(1, 9)]
        assert len(set(series)) == 8
        for colour in series:  # labels are written in it too: the contrast of text
            dark, light = sorted([luminance(colour), luminance(colours["bg"])])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_the_page_asks_for_nothing(written):
    page = (written(_result()) / "report.html").read_text()
    outline = Outline(page)
    assert outline.all("meta")[1]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not outline.all("script")
    boxes = [attrs for attrs in outline.all("div") if "scroll" in (attrs.get("class") or "")]
    assert len(boxes) == 4
    assert all({"role", "tabindex", "aria-label"} <= set(attrs) for attrs in boxes)


def test_the_same_result_gives_the_same_bytes(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    files = [write_lab_report(folder, _result(), versions={}) for folder in folders]
    for one, other in zip(*files, strict=True):
        assert one.relative_to(folders[0]) == other.relative_to(folders[1])
        assert one.read_bytes() == other.read_bytes(), one


def test_a_figure_that_contradicts_itself_costs_no_number(tmp_path):
    bad = replace(_result(), figures=[HeatMap("t", [[1.0], [1.0, 2.0]])])
    with pytest.raises(ValueError, match="one length"):
        write_lab_report(tmp_path, bad, versions={})
    assert json.loads((tmp_path / "results.json").read_text())["headline"] == HEADLINE
    with pytest.raises(ValueError, match="table 't' must have 2 cells, one a column; got 1"):
        lab_text(replace(_result(), tables=[Table("t", ["a", "b"], [["x"]])]))


def test_a_bare_result_is_a_report_too(written):
    folder = written(LabResult("probe linear", "What?", "Nothing is known."))
    outline = Outline((folder / "report.html").read_text())
    assert outline.all("h2") == []
    assert lab_text(LabResult("probe linear", "What?", "Nothing is known.")) == "Nothing is known."


NAMES = ["<script>alert(1)</script>", "a|b*c_", "\udcff\ud800\x01", "$x$"]


def test_hostile_names_stay_text(written):
    folder = written(_result(NAMES))
    page = (folder / "report.html").read_text(encoding="utf-8")
    outline = Outline(page)
    assert not outline.all("script")
    assert "<script>alert(1)</script> against a|b*c_" in outline.words
    assert r"\udcff\ud800\x01" in outline.words
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert markdown.splitlines()[0] == r"&lt;script>alert(1)&lt;/script> beats a|b\*c\_"
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + 5
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5, 14}
    assert json.loads((folder / "results.json").read_text("ascii"))["predictions"]["path"] == [
        "\udcff\ud800\x01"
    ]
    lab_text(_result(NAMES)).encode("utf-8")
    for svg in (folder / "figures").glob("*.svg"):
        assert "<script" not in svg.read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_does_not_scroll_sideways_and_shows_its_pictures(scheme, written, in_browser, hostile_names):
    results = [_result(), _result([hostile_names[2], hostile_names[5], hostile_names[4]])]
    folders = [written(result, name) for result, name in zip(results, "ab", strict=True)]
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in folders]
    sizes = in_browser(*pages, scheme=scheme)
    assert all(size["images"] == size["shown"] == 3 for size in sizes)
    assert {size["ground"] for size in sizes} == {20 if scheme == "dark" else 255}
