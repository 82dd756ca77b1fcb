"""The page of ``vit-cls evaluate``: every number, confidence, pictures, and what was asked for."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from tests.reports.conftest import REASONS, evaluation_case, every_second, predictions_of
from vit_cls.evaluation.predictions import Scoring
from vit_cls.evaluation.results import evaluate_predictions, uncertain_images, worst_images
from vit_cls.reports.evaluation import MOST_FAILURES, MOST_PAIRS
from vit_cls.reports.figures import coverage_chart, reliability_diagram
from vit_cls.reports.html import DASH
from vit_cls.stats.metrics import METRICS

NAMES = ["cat", "dog", "owl"]
SCORING = Scoring(temperature=1.5, restricted=True, tta="flip", exact=True)


def test_the_page_says_how_it_was_scored_and_with_which_weights(outline_of):
    case = evaluation_case(
        predictions_of(NAMES[:2], scoring=SCORING), licence="Apache-2.0", source="vit_small.tag"
    )
    words = outline_of(case).words
    for part in (
        "Probabilities are calibrated: logits are divided by the temperature 1.5000, fitted on validation",
        "Predictions are restricted to the 2 classes of the folder, which makes the task easier.",
        "each prediction is the mean of an image and its mirror image.",
        "Images were resized by Pillow",
        "Weights from vit_small.tag: licence Apache-2.0.",
        "bootstrap over images for the rest (seed 0)",
    ):
        assert part in words
    plain = outline_of(evaluation_case(predictions_of(NAMES[:2]))).words
    assert "Probabilities are not calibrated." in plain
    assert "restricted" not in plain
    assert "mirror" not in plain
    assert f"Weights: licence {DASH}." in plain


def test_the_page_has_every_score_with_its_interval(outline_of):
    case = evaluation_case(predictions_of(NAMES))
    result, page = case.result, outline_of(case)
    low, high = result.top1.ci95
    share = f"{100 * result.top1.value:.2f} %"
    counts = f"{result.correct} of {result.scored} images right"
    assert (
        f"{share} top-1 accuracy {counts}; 95 % interval {100 * low:.2f} % to {100 * high:.2f} %."
        in page.words
    )
    for key in ("nll", "brier", "ece", "ece_equal_mass"):
        score = result.metrics[key]
        bounds = f"{score.ci95[0]:.4f} to {score.ci95[1]:.4f}"
        assert page.row(METRICS[key].title)[1:3] == [f"{score.value:.4f}", bounds]
    assert page.row("AURC")[1:3] == [f"{result.metrics['aurc'].value:.4f}", DASH]
    assert page.row("top-3")[1] == "100.00 %"
    assert page.row("balanced accuracy")[1] == f"{100 * result.metrics['balanced_accuracy'].value:.2f} %"
    assert page.row("time")[1] == "1 min 15 s"
    for point in result.calibration.coverage:
        assert page.row(f"{100 * point.coverage:g} %")[1] == str(point.images)
    for b in result.calibration.bins:
        assert (f"{100 * b.lower:.1f} to {100 * b.upper:.1f}" in page.words) == (b.images > 0)
    assert "2 of the model's 3 classes" in page.words
    assert "vit_cls 0.1.0, torch 2.15.0" in page.words


def test_each_class_has_its_counts_and_shares_or_dashes(outline_of):
    case = evaluation_case(predictions_of(3))
    page, row = outline_of(case), case.result.per_class[0]
    low, high = row.recall_ci95
    shares = [f"{100 * share:.2f} %" for share in (row.precision, row.f1, row.recall)]
    counts = [str(count) for count in (row.support, row.correct, row.predicted)]
    assert page.row("class 0") == ["class 0", *counts, *shares, f"{100 * low:.2f} % to {100 * high:.2f} %"]
    assert page.row("class 1")[1:3] == ["0", "0"]
    assert page.row("class 1")[6:] == [DASH, DASH]  # has no images
    assert page.row("class 2")[4] == DASH  # never predicted


def test_the_confusion_matrix_has_every_count_by_row(outline_of):
    case = evaluation_case(predictions_of(30, 400))
    page = outline_of(case)
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "true \\ predicted")
    assert page.rows[start][1:] == [row.name for row in case.result.per_class]
    shown = [[int(cell or 0) for cell in row[1:]] for row in page.rows[start + 1 : start + 31]]
    assert shown == case.result.confusion.tolist()


def test_the_most_confused_pairs_come_first_and_stand_for_a_matrix_of_many_classes(outline_of):
    case = evaluation_case(predictions_of(120, 400))
    page = outline_of(case)
    assert "true \\ predicted" not in page.words
    assert f"Most confused pairs, {MOST_PAIRS} of" in page.words
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "true class")
    pair = case.result.confused_pairs()[0]
    assert page.rows[start + 1][:3] == [pair.label, pair.prediction, str(pair.images)]
    counts = [int(row[2]) for row in page.rows[start + 1 : start + 1 + MOST_PAIRS]]
    assert counts == sorted(counts, reverse=True)


def test_failed_files_are_listed_with_reasons(outline_of):
    case = evaluation_case(predictions_of(2, failed=2))
    page = outline_of(case)
    assert "2 of 120 images could not be read and are in no number here" in page.words
    path = case.about["predictions"].index.paths[1]
    assert page.row(path) == [path, REASONS[1]]
    clean = outline_of(evaluation_case(predictions_of(2))).words
    assert "0 of 120 images could not be read." in clean
    assert "Images that could not be read None." in clean
    many = outline_of(evaluation_case(predictions_of(2, MOST_FAILURES + 10, failed=MOST_FAILURES + 1))).words
    assert f"{MOST_FAILURES} of {MOST_FAILURES + 1}, with the reason" in many


def test_pictures_are_the_worst_and_the_least_sure_and_say_what_they_are(outline_of):
    predictions = predictions_of(NAMES)
    worst, uncertain = worst_images(predictions, 12), uncertain_images(predictions, 12)
    top, labels = predictions.probs.max(axis=1), predictions.index.labels
    wrong = predictions.probs.argmax(axis=1) != labels
    assert worst[0].confidence == top[wrong].max()
    assert uncertain[0].confidence == top.min()
    assert all(case.label != case.prediction for case in worst)
    assert [c.confidence for c in worst] == sorted((c.confidence for c in worst), reverse=True)
    page = outline_of(evaluation_case(predictions, thumbnails=every_second))
    for case in (*worst, *uncertain):
        assert case.path in page.words
    images, first = page.all("img"), worst[0]
    assert images[0]["alt"] == f"Thumbnail of {first.path}: {first.label}, predicted {first.prediction}"
    jpeg = base64.b64decode(images[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
    assert [s for s in page.all("span") if (s.get("aria-label") or "").startswith("No picture of ")]


def test_a_page_without_mistakes_has_no_gallery_of_them(outline_of):
    predictions = predictions_of(NAMES[:2])
    predictions.probs[:] = np.eye(2)[predictions.index.labels]
    page = outline_of(evaluation_case(predictions))
    assert "Confident and wrong" not in page.words
    assert "No scored image was given a wrong class." in page.words


@pytest.mark.parametrize("images", [1, 2, 7, 1000])
def test_charts_of_few_and_of_many_images_are_drawn_and_say_each_bin(images):
    found = evaluate_predictions(predictions_of(NAMES[:2], images)).calibration
    label = reliability_diagram("a", found.bins)
    full = [b for b in found.bins if b.images]
    assert label.count(" are right") == len(full)
    assert f"of {full[-1].images} are right" in label
    for svg in (label, coverage_chart("b", found.curve.tolist())):
        assert len(svg) < 60_000
        assert "nan" not in svg
    assert math.isfinite(found.curve[-1])
