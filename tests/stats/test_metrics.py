"""Calibration against scikit-learn, torchmetrics and hand-worked cases; intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from tests.stats.draws import draw
from vit_cls.stats.intervals import bootstrap_means, percentile_interval
from vit_cls.stats.metrics import (
    METRICS,
    Scored,
    accuracy_curve,
    calibration_of,
    equal_mass_bins,
    equal_width_bins,
)

OF_PROBABILITIES = ("nll", "brier", "ece", "ece_equal_mass", "aurc")


def _measured(probs, targets, seed=0):
    scored = Scored(probs, targets, seed)
    return {key: METRICS[key].estimate(scored) for key in OF_PROBABILITIES}


def test_brier_score_is_scikit_learns():
    probs, targets = draw()
    onehot = np.eye(6)[targets]
    expected = sum(sklearn.metrics.brier_score_loss(onehot[:, k], probs[:, k]) for k in range(6))
    assert _measured(probs, targets)["brier"].value == pytest.approx(expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_equal_width_ece_is_torchmetrics(scale):
    probs, targets = draw(scale=scale)
    expected = multiclass_calibration_error(torch.tensor(probs), torch.tensor(targets), 6, n_bins=15)
    assert _measured(probs, targets)["ece"].value == pytest.approx(float(expected), abs=1e-6)


def test_certain_predictions_are_in_the_last_bin_and_not_in_one_of_their_own():
    probs = np.array([[1.0, 0.0], [0.96, 0.04]])
    result = _measured(probs, np.array([0, 1]))
    assert result["ece"].value == pytest.approx(abs(0.5 - 0.98))
    bins = calibration_of(Scored(probs, np.array([0, 1]))).bins
    assert [b.images for b in bins] == [0] * 14 + [2]


def _reference_equal_mass_ece(probs, targets):
    """scikit-learn's calibration curve drops the sizes of bins, so: NumPy's split of the sorted images."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets
    parts = np.array_split(np.argsort(confidence), 15)
    return sum(abs(right[p].mean() - confidence[p].mean()) * len(p) for p in parts) / len(targets)


def test_equal_mass_ece_is_that_of_the_sorted_images_split_in_fifteen():
    probs, targets = draw(images=1500)
    expected = _reference_equal_mass_ece(probs, targets)
    assert _measured(probs, targets)["ece_equal_mass"].value == pytest.approx(expected)


def test_bins_of_equal_mass_hold_as_many_images_each_and_keep_ties_together():
    rng = np.random.default_rng(0)
    counts = np.bincount(equal_mass_bins(rng.random(1000)), minlength=15)
    assert counts.min() >= 66
    assert counts.max() <= 67
    assert len(set(equal_mass_bins(np.full(40, 0.5)).tolist())) == 1
    assert equal_width_bins(np.array([0.2, 1.0])).tolist() == [3, 14]


def test_nothing_depends_on_the_order_of_the_images_but_the_draws():
    probs, targets = draw(images=300)
    probs = probs.round(1) + 1e-3  # many ties
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(300)
    one, two = (_measured(probs[o], targets[o]) for o in (np.arange(300), order))
    for name in ("brier", "ece", "ece_equal_mass", "aurc"):
        assert one[name].value == pytest.approx(two[name].value, abs=1e-12)
    curves = [Scored(probs[o], targets[o]).curve for o in (np.arange(300), order)]
    np.testing.assert_allclose(*curves, atol=1e-12)


def test_accuracy_at_coverage_by_hand():
    probs = np.array([[p, 1 - p] for p in (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)])
    targets = np.array([0, 0, 0, 0, 1, 0, 0, 1, 0, 1])
    result = _measured(probs, targets)
    found = {
        p.coverage: (p.images, p.accuracy, p.min_confidence)
        for p in calibration_of(Scored(probs, targets)).coverage
    }
    assert found[0.5] == (5, 0.8, 0.8)
    assert found[0.8] == (8, 0.75, 0.65)
    assert found[0.9] == (9, 7 / 9, 0.6)
    assert found[0.95] == found[1.0] == (10, 0.7, 0.55)
    right = np.array([1, 1, 1, 1, 0, 1, 1, 0, 1, 0])
    assert result["aurc"].value == pytest.approx(1 - np.mean(right.cumsum() / np.arange(1, 11)))


def test_of_images_that_tie_each_counts_as_the_mean():
    confidence, right = np.full(4, 0.5), np.array([True, False, False, False])
    assert accuracy_curve(confidence, right).tolist() == [0.25] * 4


def test_the_seed_is_thedraw():
    probs, targets = draw(images=200)
    assert _measured(probs, targets)["ece"].ci95 == _measured(probs, targets)["ece"].ci95
    assert _measured(probs, targets)["nll"].ci95 != _measured(probs, targets, seed=1)["nll"].ci95


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
    rounds, images = 150, 800
    rng = np.random.default_rng(8)
    confidence = rng.uniform(0.6, 0.97, rounds * images)
    probs = np.column_stack([confidence, 1 - confidence])
    targets = (rng.random(len(probs)) >= confidence - 0.25).astype(int)
    whole = _population(probs, targets)
    covered = np.zeros(4)
    for i in range(rounds):
        part = slice(i * images, (i + 1) * images)
        found = _measured(probs[part], targets[part], seed=i)
        bounds = (found["nll"].ci95, found["brier"].ci95, found["ece"].ci95, found["ece_equal_mass"].ci95)
        covered += [_covers(b, truth) for b, truth in zip(bounds, whole, strict=True)]
    # 93 to 97 %, and what chance adds in so few rounds
    assert ((covered / rounds >= 0.91) & (covered / rounds <= 0.99)).all(), covered / rounds


@pytest.mark.parametrize("gap", [0.03, 0.08])
def test_intervals_of_a_small_calibration_error_are_cautious(gap):
    """Chance gaps are as large as true ones: plain percentiles cover 0 to 60 %, the basic interval 87 %."""
    rounds, images, covered = 60, 800, np.zeros(2)
    rng = np.random.default_rng(4)
    for i in range(rounds):
        confidence = rng.uniform(0.6, 0.97, images)
        targets = (rng.random(images) >= confidence - gap).astype(int)
        found = _measured(np.column_stack([confidence, 1 - confidence]), targets, seed=i)
        covered += [_covers(found["ece"].ci95, gap), _covers(found["ece_equal_mass"].ci95, gap)]
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
    rounds, zero = 80, 0
    for i in range(rounds):
        found = _measured(*draw(images=300, seed=100 + i))
        zero += found["ece"].ci95[0] == 0
        assert _covers(found["ece"].ci95, found["ece"].value)
        assert _covers(found["ece_equal_mass"].ci95, found["ece_equal_mass"].value)
    assert zero / rounds >= 0.95
