"""Calibration against scikit-learn, torchmetrics and hand-worked cases; intervals against simulation."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

from vit_cls.data.index import ImageIndex
from vit_cls.errors import DataError
from vit_cls.evaluation.calibration import (
    accuracy_curve,
    equal_mass_bins,
    equal_width_bins,
    fit_temperature,
    measure_calibration,
    tempered,
)
from vit_cls.evaluation.predictions import Predictions
from vit_cls.stats.intervals import bootstrap_means, percentile_interval


def _draw(images=1500, classes=6, scale=1.0, seed=0):
    """Probabilities that are true, then made too sure by ``scale``; and the classes drawn from them."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(images, classes))
    true = tempered(logits, 1.0)
    targets = (true.cumsum(axis=1) > rng.random((images, 1))).argmax(axis=1)
    return tempered(scale * logits, 1.0), targets


def _predictions(probs, targets, errors=None):
    names = [f"c{i}" for i in range(probs.shape[1])]
    index = ImageIndex(Path("val"), [f"{i}.png" for i in range(len(targets))], targets, names)
    return Predictions(index, probs, errors or {}, 1.0)


def test_brier_score_is_scikit_learns():
    probs, targets = _draw()
    onehot = np.eye(6)[targets]
    expected = sum(sklearn.metrics.brier_score_loss(onehot[:, k], probs[:, k]) for k in range(6))
    assert measure_calibration(probs, targets).brier == pytest.approx(expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_equal_width_ece_is_torchmetrics(scale):
    probs, targets = _draw(scale=scale)
    expected = multiclass_calibration_error(torch.tensor(probs), torch.tensor(targets), 6, n_bins=15)
    assert measure_calibration(probs, targets).ece == pytest.approx(float(expected), abs=1e-6)


def test_certain_predictions_are_in_the_last_bin_and_not_in_one_of_their_own():
    probs = np.array([[1.0, 0.0], [0.96, 0.04]])
    result = measure_calibration(probs, np.array([0, 1]))
    assert result.ece == pytest.approx(abs(0.5 - 0.98))
    assert [b.images for b in result.bins] == [0] * 14 + [2]


def _reference_equal_mass_ece(probs, targets):
    """scikit-learn's calibration curve drops the sizes of bins, so: NumPy's split of the sorted images."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets
    parts = np.array_split(np.argsort(confidence), 15)
    return sum(abs(right[p].mean() - confidence[p].mean()) * len(p) for p in parts) / len(targets)


def test_equal_mass_ece_is_that_of_the_sorted_images_split_in_fifteen():
    probs, targets = _draw(images=1500)
    expected = _reference_equal_mass_ece(probs, targets)
    assert measure_calibration(probs, targets).ece_equal_mass == pytest.approx(expected)


def test_bins_of_equal_mass_hold_as_many_images_each_and_keep_ties_together():
    rng = np.random.default_rng(0)
    counts = np.bincount(equal_mass_bins(rng.random(1000)), minlength=15)
    assert counts.min() >= 66
    assert counts.max() <= 67
    assert len(set(equal_mass_bins(np.full(40, 0.5)).tolist())) == 1
    assert equal_width_bins(np.array([0.2, 1.0])).tolist() == [3, 14]


def test_nothing_depends_on_the_order_of_the_images_but_the_draws():
    probs, targets = _draw(images=300)
    probs = probs.round(1) + 1e-3  # many ties
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(300)
    one, two = (measure_calibration(probs[o], targets[o]) for o in (np.arange(300), order))
    for name in ("brier", "ece", "ece_equal_mass", "aurc"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), abs=1e-12)
    np.testing.assert_allclose(one.curve, two.curve, atol=1e-12)


def test_accuracy_at_coverage_by_hand():
    probs = np.array([[p, 1 - p] for p in (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)])
    targets = np.array([0, 0, 0, 0, 1, 0, 0, 1, 0, 1])
    result = measure_calibration(probs, targets)
    found = {p.coverage: (p.images, p.accuracy, p.min_confidence) for p in result.coverage}
    assert found[0.5] == (5, 0.8, 0.8)
    assert found[0.8] == (8, 0.75, 0.65)
    assert found[0.9] == (9, 7 / 9, 0.6)
    assert found[0.95] == found[1.0] == (10, 0.7, 0.55)
    right = np.array([1, 1, 1, 1, 0, 1, 1, 0, 1, 0])
    assert result.aurc == pytest.approx(1 - np.mean(right.cumsum() / np.arange(1, 11)))


def test_of_images_that_tie_each_counts_as_the_mean():
    confidence, right = np.full(4, 0.5), np.array([True, False, False, False])
    assert accuracy_curve(confidence, right).tolist() == [0.25] * 4


def test_a_fitted_temperature_undoes_what_made_the_model_too_sure():
    for scale in (0.5, 2.5):
        probs, targets = _draw(images=4000, scale=scale)
        fit = fit_temperature(_predictions(probs, targets))
        assert fit.temperature == pytest.approx(scale, rel=0.1)
        assert fit.nll_after < fit.nll_before
        assert fit.ece_after < 0.03 < fit.ece_before
        assert fit.nll_before == pytest.approx(sklearn.metrics.log_loss(targets, probs))
        after = tempered(np.log(probs), fit.temperature)
        assert fit.nll_after == pytest.approx(sklearn.metrics.log_loss(targets, after))
        assert fit.ece_after == pytest.approx(measure_calibration(after, targets).ece)
        assert (after.argmax(axis=1) == probs.argmax(axis=1)).all()


def test_the_temperature_is_the_minimum_of_scikit_learns_loss():
    probs, targets = _draw(scale=2.0)
    logits = np.log(probs)
    found = minimize_scalar(
        lambda t: sklearn.metrics.log_loss(targets, tempered(logits, t)), bounds=(0.5, 5), method="bounded"
    )
    fit = fit_temperature(_predictions(probs, targets))
    assert fit.temperature == pytest.approx(found.x, rel=1e-4)
    assert fit == fit_temperature(_predictions(probs, targets))


def test_images_that_failed_are_left_out_of_the_fit_and_counted():
    probs, targets = _draw(images=200, scale=2.0)
    clean = fit_temperature(_predictions(probs[2:], targets[2:]))
    probs[:2] = np.nan
    broken = fit_temperature(_predictions(probs, targets, {0: "empty", 1: "empty"}))
    assert (broken.images, broken.failed) == (198, 2)
    assert dataclasses.replace(broken, failed=0) == clean


def test_a_validation_folder_without_a_mistake_has_no_temperature():
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    with pytest.raises(DataError, match=r"no temperature fits val: 2 of 2 images are right.*more images"):
        fit_temperature(_predictions(probs, np.array([0, 1])))
    with pytest.raises(DataError, match=r"0 of 2 images are right.*grows the less sure"):
        fit_temperature(_predictions(probs, np.array([1, 0])))
    with pytest.raises(DataError, match="none of the 2 images in val"):
        fit_temperature(_predictions(np.full((2, 2), np.nan), np.array([0, 1]), {0: "empty", 1: "empty"}))


def test_ten_thousand_images_are_resampled_a_thousand_times_within_two_seconds():
    probs, targets = _draw(images=10_000, classes=10)
    started = time.process_time()
    measure_calibration(probs, targets)
    assert time.process_time() - started < 2


def test_the_seed_is_the_draw():
    probs, targets = _draw(images=200)
    assert measure_calibration(probs, targets).ece_ci95 == measure_calibration(probs, targets).ece_ci95
    assert (
        measure_calibration(probs, targets).nll_ci95 != measure_calibration(probs, targets, seed=1).nll_ci95
    )


def test_resampled_means_have_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(size=(400, 2))
    means = bootstrap_means(values, resamples=4000)
    assert means.shape == (4000, 2)
    np.testing.assert_allclose(means.std(axis=0), values.std(axis=0) / 20, rtol=0.05)
    np.testing.assert_allclose(means.mean(axis=0), values.mean(axis=0), atol=0.005)
    low, high = percentile_interval(means[:, 0])
    assert high - low == pytest.approx(2 * 1.96 * values[:, 0].std() / 20, rel=0.07)


def _covers(bounds, truth):
    return bounds[0] <= truth <= bounds[1]


def test_intervals_of_nll_brier_and_ece_cover_the_truth_as_often_as_they_say():
    """Too sure by 25 points everywhere: gaps of one sign, well off zero: there the bootstrap holds."""
    rounds, images = 500, 800
    rng = np.random.default_rng(8)
    confidence = rng.uniform(0.6, 0.97, rounds * images)
    probs = np.column_stack([confidence, 1 - confidence])
    targets = (rng.random(len(probs)) >= confidence - 0.25).astype(int)
    whole = _population(probs, targets)
    covered = np.zeros(4)
    for i in range(rounds):
        part = slice(i * images, (i + 1) * images)
        found = measure_calibration(probs[part], targets[part], seed=i)
        bounds = (found.nll_ci95, found.brier_ci95, found.ece_ci95, found.ece_equal_mass_ci95)
        covered += [_covers(b, truth) for b, truth in zip(bounds, whole, strict=True)]
    assert ((covered / rounds >= 0.93) & (covered / rounds <= 0.97)).all(), covered / rounds


@pytest.mark.parametrize("gap", [0.03, 0.08])
def test_intervals_of_a_small_calibration_error_are_cautious(gap):
    """Chance gaps are as large as true ones: plain percentiles cover 0 to 60 %, the basic interval 87 %."""
    rounds, images, covered = 120, 800, np.zeros(2)
    rng = np.random.default_rng(4)
    for i in range(rounds):
        confidence = rng.uniform(0.6, 0.97, images)
        targets = (rng.random(images) >= confidence - gap).astype(int)
        found = measure_calibration(np.column_stack([confidence, 1 - confidence]), targets, seed=i)
        covered += [_covers(found.ece_ci95, gap), _covers(found.ece_equal_mass_ci95, gap)]
    assert (covered / rounds >= 0.93).all(), covered / rounds


def _population(probs, targets):
    """NLL, Brier score and both calibration errors of the population."""
    true = probs[np.arange(len(targets)), targets]
    brier = (probs**2).sum(axis=1) - 2 * true + 1
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets
    eces = [
        np.abs(np.bincount(bins, right - confidence)).sum() / len(targets)
        for bins in (equal_width_bins(confidence), equal_mass_bins(confidence))
    ]
    return [-np.log(true).mean(), brier.mean(), *eces]


def test_the_interval_of_a_perfectly_calibrated_model_begins_at_zero_and_holds_the_estimate():
    """Plain percentiles would exclude 0, the truth, every time: an ECE is too large by chance."""
    rounds, zero = 200, 0
    for i in range(rounds):
        found = measure_calibration(*_draw(images=300, seed=100 + i))
        zero += found.ece_ci95[0] == 0
        assert _covers(found.ece_ci95, found.ece)
        assert _covers(found.ece_equal_mass_ci95, found.ece_equal_mass)
    assert zero / rounds >= 0.95
