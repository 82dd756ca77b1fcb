"""The page of ``vit-cls compare``: the verdict first, safe, readable aloud and on a phone."""

from __future__ import annotations

import csv
import io
import itertools
import re
from dataclasses import replace

import pytest
from PIL import Image

from tests.reports.outline import Outline
from vit_cls.evaluation.comparison import (
    EQUIVALENT,
    Comparison,
    Disagreement,
    ModelScore,
    Pair,
)
from vit_cls.lab.results import ForestChart
from vit_cls.reports.compare import (
    MOST_PAIRS,
    MOST_SHOWN,
    comparison_text,
    headline,
    pictures_wanted,
    write_compare_report,
    write_disagreements,
)
from vit_cls.reports.figures import forest_chart
from vit_cls.stats.verdicts import CANNOT_TELL


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


def _result(names: list[str], verdict: str = CANNOT_TELL) -> Comparison:
    models = [ModelScore(name, 80 + i, 100, 0.8 + i / 100, (0.7, 0.9)) for i, name in enumerate(names)]
    pairs = [
        Pair(a, b, 100, 3, 70, 8, 12, 10, 0.04, (-0.05, 0.13), 0.39, 1.0, 0.74, 0.01, 0.12, verdict, None)
        for a, b in itertools.combinations(names, 2)
    ]
    needed = 812 if verdict == CANNOT_TELL else None
    return Comparison(models, [replace(pair, images_needed=needed) for pair in pairs], 7)


def _found(count: int, num_models: int = 2) -> list[Disagreement]:
    """Kinds in turn: the first model alone right, the last alone, none."""
    others = ["dog"] * (num_models - 1)
    kinds = [("cat", *others), (*others, "cat"), ("owl", *others)]
    return [
        Disagreement(f"cat/{i}.jpg", "cat", kinds[i % 3], (0.5 + i / 1000,) * num_models)
        for i in range(count)
    ]


@pytest.fixture
def page_of(tmp_path):
    """A page as text."""

    def write(result, found=(), **changes):
        given = {"data": "pets/test", "thumbnails": {}, "versions": {"vit_cls": "0.1.0"}} | changes
        write_compare_report(tmp_path / "report.html", result, found, **given)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_the_verdict_comes_first_and_the_counts_are_a_table(page_of):
    outline = Outline(page_of(_result(["runs/x", "runs/y"])))
    main = outline.words[outline.words.index("2 models on pets/test") :]
    verdict = "Cannot tell runs/x and runs/y apart on 100 images; about 812 would be needed."
    assert main.startswith(f"2 models on pets/test {verdict}")
    assert "Difference B minus A: +4.00 points" in main
    assert "100 images B right B wrong A right 70 8 A wrong 12 10" in main
    assert "100 images that both could read, 3 left out" in main
    assert "None: every image that they could read got the same class from all." in main
    assert "vit_cls 0.1.0" in main


def test_the_page_asks_for_nothing_and_names_every_picture(page_of):
    found = _found(30)
    page = page_of(_result(["x", "y"]), found, thumbnails=dict.fromkeys(pictures_wanted(found)[::2], _jpeg()))
    outline = Outline(page)
    policy = outline.all("meta")[1]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not outline.all("script")
    images = outline.all("img")
    assert len(images) == MOST_SHOWN // 2
    assert all(image["alt"].startswith("Thumbnail of cat/") for image in images)
    assert "30 images; 24 are shown" in outline.words
    assert outline.words.count("no picture") == MOST_SHOWN // 2
    assert all(
        {"role", "tabindex", "aria-label"} <= set(a) for a in outline.all("div") if "scroll" in a["class"]
    )
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_each_picture_has_the_truth_and_both_predictions(page_of):
    found = [Disagreement("cat/1.jpg", "cat", ("cat", "dog"), (0.61, 0.523))]
    words = Outline(page_of(_result(["x", "y"]), found, thumbnails={"cat/1.jpg": _jpeg()})).words
    assert re.search(r"cat/1.jpg ?truth: cat A right: cat 61.00 % B wrong: dog 52.30 %", words)
    table = Outline(page_of(_result(["x", "y"]), found, data=None)).words
    assert "cat/1.jpg cat right: cat" in table


def test_pictures_are_of_each_kind_the_most_confident_mistakes_first():
    found = _found(90)
    shown = pictures_wanted(found)
    assert len(shown) == len(set(shown)) == MOST_SHOWN
    rights = {one.path: one.right for one in found}
    kinds = [rights[path] for path in shown]
    assert kinds == [(False, True)] * 12 + [(True, False)] * 12  # images that none got right come after
    assert shown[:2] == ["cat/88.jpg", "cat/85.jpg"]
    assert len(pictures_wanted(_found(9))) == 9
    assert [rights[path] for path in pictures_wanted(_found(9))][-3:] == [(False, False)] * 3


def test_three_models_have_a_verdict_of_their_own():
    result = _result(["x", "y", "z"], EQUIVALENT)
    assert headline(result) == (
        "None is better than all others: of 3 pairs, 0 differ, 3 are equivalent within the margin, "
        "0 cannot be told apart."
    )
    pairs = [replace(pair, verdict="z is better") if pair.b == "z" else pair for pair in result.pairs]
    assert headline(replace(result, pairs=pairs)) == "z is better than each of the others."
    text = comparison_text(result)
    assert "adjusted over 3 pairs" in text
    assert text.count("equivalent within the margin of 1 point.") == 3


def test_the_text_opens_with_the_verdict():
    lines = comparison_text(_result(["runs/x", "runs/y"])).splitlines()
    assert lines[0] == "Cannot tell runs/x and runs/y apart on 100 images; about 812 would be needed."
    assert lines[1] == "A  80 of 100 images right, top-1 0.8000, 95 % interval 0.7000 to 0.9000: runs/x"
    assert lines[4].endswith("both right 70, only A 8, only B 12, both wrong 10")
    assert lines[5] == "difference B - A       +0.0400   95 % bootstrap interval -0.0500 to +0.1300"


def test_the_table_has_a_row_for_every_disagreement(tmp_path):
    found = [*_found(40), Disagreement("dog/\udcff.jpg", "dog", ("", 'a "b", c'), (float("nan"), 1.0))]
    write_disagreements(tmp_path / "c.csv", found, 2)
    with (tmp_path / "c.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == [
        "path",
        "label",
        "a_prediction",
        "b_prediction",
        "a_probability",
        "b_probability",
    ]
    assert len(rows) == 41
    assert rows[-1]["path"] == "dog/\udcff.jpg"
    assert rows[-1]["b_prediction"] == 'a "b", c'
    assert rows[-1]["a_probability"] == ""


def test_the_chart_is_the_same_twice_and_says_what_it_shows():
    rows = [("B minus A", 0.04, (0.01, 0.07)), ("C minus A", -0.02, (-0.05, 0.01))]
    svg = forest_chart("f", ForestChart("Difference", rows, 0.01))
    assert svg == forest_chart("f", ForestChart("Difference", rows, 0.01))
    assert "C minus A -2.00 points, 95 % interval -5.00 to +1.00" in svg
    assert "#01020" not in svg
    assert svg != forest_chart("f", ForestChart("Difference", rows, 0.02))


@pytest.fixture(params=["2 models", "9 models", "table"])
def any_page(request, page_of, hostile_names):
    """Pages filled with names that do their worst."""
    count = 9 if request.param == "9 models" else 2
    names = [*hostile_names, "eight", "nine"][:count]
    found = [
        Disagreement(f"{name}/{i}.jpg", name, (name, *[hostile_names[2]] * (count - 1)), (0.9,) * count)
        for i, name in enumerate(hostile_names * 4)
    ]
    pictures = {} if request.param == "table" else dict.fromkeys(pictures_wanted(found)[::2], _jpeg())
    return page_of(_result(names), found, data=hostile_names[0] + hostile_names[2], thumbnails=pictures)


def test_hostile_names_stay_text(any_page):
    outline = Outline(any_page)
    assert not outline.all("script")
    assert "<script>alert(1)</script>" in outline.words
    assert "<b>bold" in outline.words
    assert len(re.findall("A right 70", outline.words)) <= MOST_PAIRS


def test_page_does_not_scroll_sideways_and_shows_its_pictures(any_page, in_browser):
    assert all(size["images"] == size["shown"] for size in in_browser(any_page))
