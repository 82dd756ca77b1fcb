"""Ridge regression against scikit-learn, at once and by moments of parts; R2 as a ratio of sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from vit_cls.stats.intervals import bootstrap_means, percentile_interval
from vit_cls.stats.least_squares import fits_of_moments, moments_of, r2, r2_scores, ridge_fits
from vit_cls.stats.random_effects import mean_interval


def test_ridge_is_that_of_scikit_learn_for_more_rows_and_for_more_features(generator):
    for rows, features in ((40, 7), (9, 20)):
        x = torch.randn(rows, features, generator=generator).double().numpy() * 3 + 1
        y = torch.randn(rows, 2, generator=generator).double().numpy()
        z = (x - x.mean(0)) / x.std(0)
        alpha = 0.1 * rows  # the mean eigenvalue of z'z is the number of rows
        expected = Ridge(alpha=alpha).fit(z, y).predict(z)
        [fit] = ridge_fits(x, y, [0.1])
        np.testing.assert_allclose(fit(x), expected, atol=1e-9)
        halves = [(x[: rows // 2], y[: rows // 2]), (x[rows // 2 :], y[rows // 2 :])]
        [merged] = fits_of_moments(moments_of(halves), [0.1])
        np.testing.assert_allclose(merged(x), expected, atol=1e-9)


def test_scores_have_the_mean_and_the_interval_of_a_ratio():
    rng = np.random.default_rng(0)
    totals = rng.gamma(2.0, size=400)
    errors = totals * rng.uniform(0.1, 0.6, size=400)
    scores = r2_scores(errors, totals)
    assert scores.mean() == pytest.approx(r2(errors, totals))
    sums = bootstrap_means(np.stack([errors, totals], axis=1), resamples=2000)
    low, high = percentile_interval(1 - sums[:, 0] / sums[:, 1])
    np.testing.assert_allclose(mean_interval(scores).ci95, (low, high), atol=0.004)
    naive = mean_interval(1 - errors / totals.mean()).ci95
    assert naive[1] - naive[0] > 1.5 * (high - low)  # what the linearisation is for
