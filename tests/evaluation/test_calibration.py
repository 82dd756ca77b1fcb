"""A temperature undoes what made a model overconfident, and is the minimum of the loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from scipy.optimize import minimize_scalar

from tests.stats.draws import draw
from vit_cls.data.index import ImageIndex
from vit_cls.errors import DataError
from vit_cls.evaluation.calibration import fit_temperature, tempered
from vit_cls.evaluation.predictions import Predictions
from vit_cls.stats.metrics import METRICS, Scored


def _predictions(probs, targets, errors=None):
    names = [f"c{i}" for i in range(probs.shape[1])]
    index = ImageIndex(Path("val"), [f"{i}.png" for i in range(len(targets))], targets, names)
    return Predictions(index, probs, errors or {}, 1.0)


def test_a_fitted_temperature_undoes_what_made_the_model_too_sure():
    for scale in (0.5, 2.5):
        probs, targets = draw(images=4000, scale=scale)
        fit = fit_temperature(_predictions(probs, targets))
        assert fit.temperature == pytest.approx(scale, rel=0.1)
        assert fit.nll_after < fit.nll_before
        assert fit.ece_after < 0.03 < fit.ece_before
        assert fit.nll_before == pytest.approx(sklearn.metrics.log_loss(targets, probs))
        after = tempered(np.log(probs), fit.temperature)
        assert fit.nll_after == pytest.approx(sklearn.metrics.log_loss(targets, after))
        assert fit.ece_after == pytest.approx(METRICS["ece"].estimate(Scored(after, targets)).value)
        assert (after.argmax(axis=1) == probs.argmax(axis=1)).all()


def test_the_temperature_is_the_minimum_of_scikit_learns_loss():
    probs, targets = draw(scale=2.0)
    logits = np.log(probs)
    found = minimize_scalar(
        lambda t: sklearn.metrics.log_loss(targets, tempered(logits, t)), bounds=(0.5, 5), method="bounded"
    )
    fit = fit_temperature(_predictions(probs, targets))
    assert fit.temperature == pytest.approx(found.x, rel=1e-4)
    assert fit == fit_temperature(_predictions(probs, targets))


def test_images_that_failed_are_left_out_of_the_fit_and_counted():
    probs, targets = draw(images=200, scale=2.0)
    clean = fit_temperature(_predictions(probs[2:], targets[2:]))
    probs[:2] = np.nan
    broken = fit_temperature(_predictions(probs, targets, {0: "empty", 1: "empty"}))
    assert (broken.images, broken.failed) == (198, 2)
    assert dataclasses.replace(broken, failed=0) == clean


def test_a_validation_folder_without_a_mistake_has_no_temperature():
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    with pytest.raises(DataError, match=r"no temperature fits val: 2 of 2 images are right.*more images"):
        fit_temperature(_predictions(probs, np.array([0, 1])))
    with pytest.raises(DataError, match=r"0 of 2 images are right.*grows without end the less confident"):
        fit_temperature(_predictions(probs, np.array([1, 0])))
    with pytest.raises(DataError, match="none of the 2 images in val"):
        fit_temperature(_predictions(np.full((2, 2), np.nan), np.array([0, 1]), {0: "empty", 1: "empty"}))
