"""What stands on the pages, and that it stands there safely."""

from __future__ import annotations

import re

import pytest

from tests.reports.outline import Outline
from vit_cls.errors import RunError
from vit_cls.reports.html import DASH, MOST_FAILURES, MOST_PAIRS
from vit_cls.stats.intervals import wilson_interval


def _words(page: str) -> str:
    return " ".join(Outline(page).text.split())


def test_page_is_well_formed_and_self_contained(any_page):
    page = Outline(any_page)
    assert page.elements[0][0] == "html"
    assert page.all("html") == [{"lang": "en"}]
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    for name, attrs in page.elements:
        assert not [a for a in attrs if a == "src" or a.startswith("on")], (name, attrs)
        for key in ("href", "xlink:href"):
            assert (attrs.get(key) or "#").startswith("#")
    assert "@import" not in any_page
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", any_page))


def test_ids_are_unique_and_references_resolve(any_page):
    ids = [attrs["id"] for _, attrs in Outline(any_page).elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', any_page)) <= set(ids)


def test_page_can_be_read_aloud(any_page):
    page = Outline(any_page)
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert all(len(page.all(name)) == 1 for name in ("header", "main", "footer", "title"))
    assert len(page.all("table")) == len(page.all("caption")) > 0
    assert all(attrs["scope"] in ("col", "row") for attrs in page.all("th"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.all("svg"))
    boxes = [attrs for attrs in page.all("div") if "scroll" in (attrs.get("class") or "").split()]
    assert boxes
    assert all(box["role"] == "region" and box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_hostile_text_stays_text(any_page):
    assert "<script" not in any_page.replace("&lt;script", "")
    assert "<img" not in any_page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in any_page
    any_page.encode("utf-8")  # no lone surrogate
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", any_page)


def test_path_that_is_not_utf8_is_shown_escaped(evaluation, evaluation_page):
    failures = [("a\udcff\x01.jpg", "empty")]
    assert "a\\udcff\\x01.jpg" in evaluation_page(evaluation(2, failed=1), failures=failures)


def test_no_value_is_a_dash_and_nothing_says_nan(any_page):
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"<p>None\.</p>", "", any_page))


def test_same_arguments_give_the_same_page(evaluation, evaluation_page, fit_page, record, history):
    assert fit_page(record, history) == fit_page(record, history)
    assert evaluation_page(evaluation(5)) == evaluation_page(evaluation(5))


def test_fit_page_has_the_numbers_of_the_record(fit_page, record, history, tmp_path):
    words = _words(fit_page(record, history))
    for part in (
        "94.17 % top-1 accuracy 113 of 120 validation images right; 95 % interval 90.12 % to 96.34 %.",
        "The model is that of epoch 3, counted from 0, the best of 4.",
        f"vit-cls evaluate --model {tmp_path} --data FOLDER",
        "Parameters 464,458",
        "Input 28 × 42 pixels",  # noqa: RUF001
        "Split 0.1 of each class of my photos held out for validation, seed 42",
        "Weights licence the licence is yours to choose",
        "vit-cls fit --data.root 'my photos'",
        "Seed 42",
        "Device NVIDIA H200",
        "Started 2026-11-20 11:46 UTC",
        "Time 1 h 8 min",
        "Commit 3505d532f5a09fa4ace7e9b060d4b8bf18418305+",
        "Versions vit_cls 0.1.0, python 3.11.7, torch 2.15.0",
    ):
        assert part in words
    assert DASH not in words


def test_fit_page_has_a_row_for_each_epoch_and_class(fit_page, record, history):
    page = Outline(fit_page(record, history))
    numbers = "17 0.002 2.5000 2.2500 25.00 % 90.00 % 30 120 1 min 5 s 1,764"
    assert " ".join(page.row("0")) == f"0 {numbers}"
    assert [attrs.get("class") for attrs in page.all("tr")].count("best") == 1
    assert page.row("owl")[1] == "28"
    assert page.row("epoch")[6] == "top-3"  # there are three classes


def test_fit_page_draws_what_the_history_has(fit_page, record, history):
    assert len(Outline(fit_page(record, history)).all("svg")) == 3
    assert len(Outline(fit_page(record, [{"epoch": 0.0, "lr": 0.1}])).all("svg")) == 1
    assert "No epoch is on record" in _words(fit_page(record, []))


def test_fit_page_shows_missing_and_diverged_values_as_dashes(fit_page, record, history):
    history[1] = {"epoch": 1.0, "train/loss": float("nan"), "grad/norm": 12.345}
    page = Outline(fit_page(record, history))
    assert page.row("1") == ["1", DASH, DASH, DASH, *[DASH] * 7, "12.35"]
    assert page.row("epoch")[-1] == "grad/norm"


def test_fit_page_of_a_bare_record_shows_dashes(fit_page, record, history):
    words = _words(fit_page({"result": record["result"]}, history))
    for label in ("Parameters", "Split", "Versions", "Started", "Seed", "Weights licence", "Input"):
        assert f"{label} {DASH}" in words


def test_fit_report_refuses_a_run_without_result(fit_page, record, history):
    record["status"] = "interrupted"
    del record["result"]
    with pytest.raises(RunError, match=r"finished run.*'interrupted'.*--resume"):
        fit_page(record, history)


def test_evaluation_page_has_the_numbers_of_the_result(evaluation, evaluation_page):
    result = evaluation(3)
    page = evaluation_page(result)
    low, high = result.top1.ci95
    assert (
        f"{result.top1.value:.2%}".replace("%", " %")
        + f" top-1 accuracy {result.correct} of {result.scored} images "
        f"right; 95 % interval {100 * low:.2f} % to {100 * high:.2f} %."
    ) in _words(page)
    rows = Outline(page)
    assert rows.row("top-3")[1] == "98.76 %"
    assert rows.row("balanced accuracy")[1] == "87.65 %"
    assert rows.row("NLL")[1] == "0.4321"
    assert rows.row("ECE")[1] == "0.0567"
    assert rows.row("time")[1] == "1 min 15 s"
    assert "2 of the model's 3 classes" in _words(page)
    assert "vit_cls 0.1.0, torch 2.15.0" in _words(page)


def test_class_table_has_counts_and_wilson_interval_and_dashes(evaluation, evaluation_page):
    result = evaluation(3)
    page = Outline(evaluation_page(result))
    row = result.per_class[0]
    low, high = wilson_interval(row.correct, row.support)
    shares = [f"{100 * share:.2f} %" for share in (row.precision, row.f1, row.recall)]
    counts = [str(count) for count in (row.support, row.correct, row.predicted)]
    assert page.row("class 0") == ["class 0", *counts, *shares, f"{100 * low:.2f} % to {100 * high:.2f} %"]
    assert page.row("class 1")[1:] == ["0", "0", "0", DASH, DASH, DASH, DASH]
    assert page.row("class 2")[4] == DASH  # never predicted


def test_confusion_matrix_shows_every_count_by_row(evaluation, evaluation_page):
    result = evaluation(30)
    page = Outline(evaluation_page(result))
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "true \\ predicted")
    assert page.rows[start][1:] == [row.name for row in result.per_class]
    shown = [[int(cell or 0) for cell in row[1:]] for row in page.rows[start + 1 : start + 31]]
    assert shown == result.confusion.tolist()


def test_many_classes_show_the_most_confused_pairs_instead_of_a_matrix(evaluation, evaluation_page):
    words = _words(evaluation_page(evaluation(120)))
    assert "true \\ predicted" not in words
    assert f"Most confused pairs, {MOST_PAIRS} of" in words


def test_most_confused_pair_comes_first(evaluation, evaluation_page):
    page = Outline(evaluation_page(evaluation(31)))
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "true class")
    assert page.rows[start + 1][:3] == ["class 30", "class 0", "4"]
    counts = [int(row[2]) for row in page.rows[start + 1 : start + 1 + MOST_PAIRS]]
    assert counts == sorted(counts, reverse=True)


def test_failed_files_are_listed_with_reasons(evaluation, evaluation_page):
    result = evaluation(2, failed=2)
    page = evaluation_page(result, failures=[("a.jpg", "empty"), ("b.jpg", "truncated")])
    assert f"2 of {result.images} images could not be read and are in no number here" in _words(page)
    assert Outline(page).row("b.jpg") == ["b.jpg", "truncated"]
    clean = _words(evaluation_page(evaluation(2)))
    assert f"0 of {result.scored} images could not be read." in clean
    assert "Images that could not be read None." in clean


def test_long_list_of_failures_says_how_many_there_are(evaluation, evaluation_page):
    failures = [(f"{i}.jpg", "empty") for i in range(MOST_FAILURES + 1)]
    words = _words(evaluation_page(evaluation(2, failed=len(failures)), failures=failures))
    assert f"{MOST_FAILURES} of {MOST_FAILURES + 1}, with the reason" in words


def test_text_has_contrast_in_both_schemes(evaluation, evaluation_page):
    themes = re.findall(r":root \{(.*?)\}", evaluation_page(evaluation(2)), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colour = dict(re.findall(r"--([\w-]+): ([^;]+);", theme))
        for text in ("text", "muted", "series-1"):
            for ground in ("bg", "panel"):
                assert _contrast(_hex(colour[text]), _hex(colour[ground])) >= 4.5
        for tint in ("hit", "miss"):  # as strong as a cell can be
            rgb = [int(part) for part in colour[tint].split()]
            cell = [0.55 * t + 0.45 * b for t, b in zip(rgb, _hex(colour["bg"]), strict=True)]
            assert _contrast(_hex(colour["text"]), cell) >= 4.5


def _hex(colour: str) -> list[float]:
    digits = colour.strip("# ")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def _contrast(one: list[float], other: list[float]) -> float:
    """Ratio of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(rgb):
        parts = [c / 255 for c in rgb]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_the_page_of_a_fine_tuned_run_tells_what_became_of_the_weights(fit_page, record, history):
    assert "Weights it began with" not in fit_page(record, history)
    rows = [{"fate": "moved", "keys": "fc_norm.weight", "count": 1, "note": "from norm.weight"}]
    counts = {"loaded": 148, "resized": 0, "moved": 2, "dropped": 0, "fresh": 2}
    report = {"source": "vit_small.tag", "counts": counts, "rows": rows, "notes": ["the norm is kept"]}
    record["model"]["load_report"] = report
    page = fit_page(record, history)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "From vit_small.tag . Tensors: 148 loaded, 2 moved, 2 fresh." in text
    assert "moved fc_norm.weight 1 from norm.weight" in text
    assert "the norm is kept" in text
