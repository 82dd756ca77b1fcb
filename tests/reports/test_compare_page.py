"""The page and the table of ``vit-cls compare``: the verdict first, then what the models disagree on."""

from __future__ import annotations

import csv
import re
from dataclasses import replace

from tests.reports.conftest import Case, comparison_of, disagreements_of, every_second, jpeg
from vit_cls.evaluation.comparison import EQUIVALENT, Disagreement
from vit_cls.reports.compare import MOST_PAIRS, MOST_SHOWN

TWO = comparison_of(["runs/x", "runs/y"])


def _case(result=TWO, found=(), **changes) -> Case:
    return Case(result, {"found": found, "data": "pets/test"} | changes)


def test_the_verdict_comes_first_and_the_counts_are_a_table(outline_of):
    outline = outline_of(_case())
    main = outline.words[outline.words.index("2 models on pets/test") :]
    verdict = "Cannot tell runs/x and runs/y apart on 100 images; about 812 would be needed."
    assert main.startswith(f"2 models on pets/test {verdict}")
    assert "Difference B minus A: +4.00 points" in main
    assert "100 images B right B wrong A right 70 8 A wrong 12 10" in main
    assert "100 images that both could read, 3 left out" in main
    assert "None: every image that they could read got the same class from all." in main
    assert "vit_cls 0.1.0" in main
    (svg,) = outline.all("svg")
    assert svg["aria-label"].endswith("B minus A +4.00 points, 95 % interval -5.00 to +13.00")


def test_some_disagreements_are_shown_and_the_page_says_how_many_there_are(outline_of):
    outline = outline_of(_case(found=disagreements_of(30), thumbnails=every_second))
    assert [image["alt"][:17] for image in outline.all("img")] == ["Thumbnail of cat/"] * (MOST_SHOWN // 2)
    assert "30 images; 24 are shown" in outline.words
    assert outline.words.count("no picture") == MOST_SHOWN // 2


def test_each_picture_has_the_truth_and_both_predictions(outline_of):
    found = [Disagreement("cat/1.jpg", "cat", ("cat", "dog"), (0.61, 0.523))]
    words = outline_of(_case(found=found, thumbnails=lambda paths: dict.fromkeys(paths, jpeg()))).words
    assert re.search(r"cat/1.jpg ?truth: cat A right: cat 61.00 % B wrong: dog 52.30 %", words)
    assert "cat/1.jpg cat right: cat" in outline_of(_case(found=found, data=None)).words


def test_pictures_are_of_each_kind_the_most_confident_mistakes_first(outline_of):
    def shown(count: int) -> list[str]:
        wanted: list[str] = []
        outline_of(_case(found=disagreements_of(count), thumbnails=lambda paths: wanted.extend(paths) or {}))
        return wanted

    rights = {image.path: image.right for image in disagreements_of(90)}
    paths = shown(90)
    assert len(paths) == len(set(paths)) == MOST_SHOWN
    kinds = [rights[path] for path in paths]
    assert kinds == [(False, True)] * 12 + [(True, False)] * 12  # images that none got right come after
    assert paths[:2] == ["cat/88.jpg", "cat/85.jpg"]
    assert len(shown(9)) == 9
    assert [rights[path] for path in shown(9)][-3:] == [(False, False)] * 3


def test_three_models_have_a_verdict_of_their_own():
    result = comparison_of(["x", "y", "z"], EQUIVALENT)
    assert result.sentence == (
        "None is better than all others: of 3 pairs, 0 differ, 3 are equivalent within the margin, "
        "0 cannot be told apart."
    )
    pairs = [replace(pair, verdict="z is better") if pair.b == "z" else pair for pair in result.pairs]
    assert replace(result, pairs=pairs).sentence == "z is better than each of the others."


def test_many_models_have_every_pair_in_the_table_and_some_in_the_chart(outline_of):
    outline = outline_of(_case(comparison_of([f"runs/{i}" for i in range(9)])))
    assert f"The first {MOST_PAIRS} of 36 pairs" in outline.words
    assert len([row for row in outline.rows if row and " minus " in row[0]]) == 36


def test_the_table_has_a_row_for_every_disagreement(folder_of):
    odd = Disagreement("dog/\udcff.jpg", "dog", ("", 'a "b", c'), (float("nan"), 1.0))
    folder = folder_of(_case(found=[*disagreements_of(40), odd]))
    with (folder / "comparison.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == [
        "path",
        "label",
        *(f"{m}_{n}" for n in ("prediction", "probability") for m in "ab"),
    ]
    assert len(rows) == 41
    assert rows[-1]["path"] == "dog/\udcff.jpg"
    assert rows[-1]["b_prediction"] == 'a "b", c'
    assert rows[-1]["a_probability"] == ""
