"""Metrics against scikit-learn, hand-worked cases, and simulation."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics

from vit_cls.data.index import ImageIndex
from vit_cls.errors import DataError
from vit_cls.evaluation.predictions import Predictions, Scoring
from vit_cls.evaluation.results import Evaluation, evaluate_predictions
from vit_cls.reports.folder import write_folder
from vit_cls.reports.terminal import text
from vit_cls.stats.intervals import wilson_interval
from vit_cls.stats.metrics import METRICS, Estimate, Metric


def _predictions(images=400, classes=7, failed=(), present=None, seed=0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.choice(present if present is not None else classes, images)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), labels] += 1.0
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probs[list(failed)] = np.nan
    names = [f"c{i}" for i in range(classes)]
    index = ImageIndex(Path("root"), [f"{i}.png" for i in range(images)], labels, names)
    return Predictions(index, probs, dict.fromkeys(failed, "broken"), 1.0)


def test_metrics_are_scikit_learns():
    predictions = _predictions()
    result = evaluate_predictions(predictions)
    labels, probs = predictions.index.labels, predictions.probs
    preds = probs.argmax(axis=1)
    assert result.correct == (preds == labels).sum()
    assert result.top1.value == pytest.approx(sklearn.metrics.accuracy_score(labels, preds))
    assert result.metrics["top5"].value == pytest.approx(
        sklearn.metrics.top_k_accuracy_score(labels, probs, k=5)
    )
    assert result.metrics["balanced_accuracy"].value == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(labels, preds)
    )
    assert result.metrics["nll"].value == pytest.approx(sklearn.metrics.log_loss(labels, probs))
    assert (result.confusion == sklearn.metrics.confusion_matrix(labels, preds)).all()
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(labels, preds)
    assert [row.precision for row in result.per_class] == pytest.approx(precision.tolist())
    assert [row.recall for row in result.per_class] == pytest.approx(recall.tolist())
    assert [row.f1 for row in result.per_class] == pytest.approx(f1.tolist())
    assert [row.support for row in result.per_class] == support.tolist()


def test_no_result_leaves_out_how_far_its_probabilities_can_be_believed():
    given = vars(evaluate_predictions(_predictions()))
    with pytest.raises(TypeError, match="calibration"):
        Evaluation(**{key: value for key, value in given.items() if key != "calibration"})


def test_failed_images_are_counted_beside_and_change_nothing_else():
    whole = _predictions()
    broken = _predictions(failed=(3, 77))
    kept = np.delete(np.arange(400), [3, 77])
    result = evaluate_predictions(broken)
    assert (result.images, result.failed, result.scored) == (400, 2, 398)
    assert result.correct == (whole.probs[kept].argmax(axis=1) == whole.index.labels[kept]).sum()
    assert result.top1.value == result.correct / 398


def test_absent_classes_are_stated_and_not_averaged():
    predictions = _predictions(present=[1, 4])
    result = evaluate_predictions(predictions)
    assert result.classes_present == 2
    recalls = [row.recall for row in result.per_class]
    assert [r is None for r in recalls] == [True, False, True, True, False, True, True]
    assert result.metrics["balanced_accuracy"].value == pytest.approx((recalls[1] + recalls[4]) / 2)


@pytest.mark.parametrize("classes", [2, 3, 5, 6])
def test_top5_works_for_any_number_of_classes(classes):
    result = evaluate_predictions(_predictions(images=50, classes=classes))
    assert (
        result.metrics["top5"].value == 1.0
        if classes <= 5
        else result.top1.value < result.metrics["top5"].value < 1.0
    )


def test_a_certain_and_wrong_prediction_has_a_finite_loss():
    predictions = _predictions(images=2, classes=2)
    predictions.probs[:] = [[1.0, 0.0], [1.0, 0.0]]
    assert np.isfinite(evaluate_predictions(predictions).metrics["nll"].value)


def test_nothing_scored_is_an_error_that_names_a_file():
    with pytest.raises(DataError, match=r"none of the 3 images in root could be read.*0.png: broken"):
        evaluate_predictions(_predictions(images=3, failed=(0, 1, 2)))


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 20), (7, 10), (20, 20), (341, 599), (99, 100)])
def test_wilson_interval_is_its_formula(successes, trials):
    share, z = successes / trials, 1.959963984540054
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    lower, upper = wilson_interval(successes, trials)
    assert (lower, upper) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert 0.0 <= lower <= share <= upper <= 1.0


def test_impossible_counts_are_refused():
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="need 0 <= successes <= trials"):
            wilson_interval(successes, trials)


def test_confused_pairs_are_the_cells_off_the_diagonal_the_most_frequent_first():
    predictions = _predictions(images=300, classes=4)
    result = evaluate_predictions(predictions)
    pairs = result.confused_pairs()
    assert sum(pair.images for pair in pairs) == result.scored - result.correct
    assert [p.images for p in pairs] == sorted((p.images for p in pairs), reverse=True)
    first = pairs[0]
    names = predictions.index.class_names
    assert result.confusion[names.index(first.label), names.index(first.prediction)] == first.images
    assert first.support == (predictions.index.labels == names.index(first.label)).sum()


def test_the_result_says_how_it_was_scored():
    scoring = Scoring(temperature=2.0, tta="flip")
    predictions = dataclasses.replace(_predictions(images=50), scoring=scoring)
    assert evaluate_predictions(predictions).scoring == scoring
    assert scoring.calibrated
    assert not Scoring().calibrated


def test_classes_that_were_ruled_out_do_no_harm():
    predictions = _predictions(images=60, classes=5, present=[0, 2])
    predictions.probs[:, [1, 3, 4]] = 0.0
    predictions.probs[:] /= predictions.probs.sum(axis=1, keepdims=True)
    result = evaluate_predictions(predictions)
    assert result.metrics["top5"].value == 1.0
    assert np.isfinite([one.value for one in result.metrics.values()]).all()
    assert result.confusion[:, [1, 3, 4]].sum() == 0


def test_a_metric_is_a_function_and_a_row(monkeypatch, tmp_path):
    mistakes = Metric(
        "mistakes", "wrong over scored", lambda scored: Estimate(1 - scored.right.mean(), (0.0, 0.75))
    )
    monkeypatch.setitem(METRICS, "mistakes", mistakes)
    predictions = _predictions()
    result = evaluate_predictions(predictions)
    assert result.to_dict()["mistakes"] == 1 - result.top1.value
    assert result.to_dict()["mistakes_ci95"] == [0.0, 0.75]
    assert re.search(r"^mistakes +0\.\d{4}   95 % interval 0\.0000 to 0\.7500$", text(result), re.MULTILINE)
    write_folder(tmp_path, result, predictions=predictions, model="m", data="d")
    assert "wrong over scored" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_json_keeps_the_keys_that_scripts_read_in_their_order():
    keys = evaluate_predictions(_predictions(images=40)).to_dict()
    assert " ".join(keys) == (
        "images failed scored correct top1 top1_ci95 top5 balanced_accuracy nll nll_ci95 brier brier_ci95 "
        "ece ece_ci95 ece_equal_mass ece_equal_mass_ci95 accuracy_at_coverage aurc most_confused calibrated "
        "temperature restricted tta exact device device_name precision seed seconds "
        "images_per_second classes classes_present"
    )
