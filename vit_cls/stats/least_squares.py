"""Ridge regression in closed form, float64, and R2: one eigendecomposition serves every penalty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PENALTIES = tuple(float(10.0**power) for power in range(-6, 4))
"""In multiples of the mean eigenvalue of the features' covariance, so that they suit any number of images."""
R2_UNIT = "of R2"
_RANK = 1e-12
"""Eigenvalues below this share of the largest count as zero."""


@dataclass(frozen=True)
class Moments:
    """What a ridge regression needs of features and targets; moments of parts add up.

    Args:
        x: Mean of the features; ``y`` of the targets.
        scale: What features are divided by.
        xx: Sum of products of the standardised features, shape ``(features, features)``.
        xy: Sum of products of standardised features and centred targets, shape ``(features, targets)``.
    """

    count: int
    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    xx: np.ndarray
    xy: np.ndarray


@dataclass(frozen=True)
class Linear:
    """An affine map from features to targets.

    Args:
        weight: Shape ``(features, targets)``.
        penalty: The strength that it was fitted with, as in `PENALTIES`; 0 is least squares.
    """

    weight: np.ndarray
    bias: np.ndarray
    penalty: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Predictions for features of shape ``(rows, features)``: float64, shape ``(rows, targets)``."""
        return np.asarray(x, dtype=np.float64) @ self.weight + self.bias


def scale_of(variance: np.ndarray) -> np.ndarray:
    """Standard deviations to divide by, from variances; 1 where a feature is constant up to rounding."""
    floor = 1e-14 * max(float(variance.max(initial=0.0)), 1e-300)
    return np.sqrt(np.where(variance <= floor, 1.0, variance))


def ridge_fits(x: np.ndarray, y: np.ndarray, penalties: Sequence[float] = PENALTIES) -> Iterator[Linear]:
    """One fit a penalty, made as it is asked for, of standardised features; the intercept is not penalised.

    Args:
        x: Features, shape ``(rows, features)``.
        y: Targets, shape ``(rows, targets)``.
        penalties: Strengths; 0 is least squares of the smallest norm.

    Example:
        >>> x = np.array([[0.0], [1.0], [2.0]])
        >>> [fit] = ridge_fits(x, 3 * x + 1, [0.0])
        >>> fit(np.array([[10.0]])).round(6)
        array([[31.]])

    Source:
        Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 3.4.1; the smaller of
        the two Gram matrices (features or rows) is decomposed.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    mean, centre = x.mean(axis=0), y.mean(axis=0)
    scale = scale_of(x.var(axis=0))
    z, t = (x - mean) / scale, y - centre
    if x.shape[1] <= x.shape[0]:
        yield from fits_of_moments(Moments(len(x), mean, centre, scale, z.T @ z, z.T @ t), penalties)
        return
    values, vectors = np.linalg.eigh(z @ z.T)
    rotated = vectors.T @ t
    for penalty in penalties:
        shrunk = vectors @ (_inverse(values, penalty, x.shape[1])[:, None] * rotated)
        yield _unstandardised(z.T @ shrunk, mean, centre, scale, penalty)


def fits_of_moments(moments: Moments, penalties: Sequence[float] = PENALTIES) -> Iterator[Linear]:
    """One fit a penalty where the rows are too many to hold.

    Args:
        moments: Of all rows.
    """
    values, vectors = np.linalg.eigh(moments.xx)
    rotated = vectors.T @ moments.xy
    for penalty in penalties:
        weight = vectors @ (_inverse(values, penalty, len(values))[:, None] * rotated)
        yield _unstandardised(weight, moments.x, moments.y, moments.scale, penalty)


def _inverse(values: np.ndarray, penalty: float, features: int) -> np.ndarray:
    """Eigenvalues plus penalty, inverted; those that are zero stay out of an unpenalised fit."""
    values = np.clip(values, 0.0, None)
    if penalty > 0:
        return 1 / (values + penalty * max(values.sum() / features, 1e-300))
    kept = values > _RANK * max(values.max(initial=0.0), 1e-300)
    return np.where(kept, 1 / np.where(kept, values, 1.0), 0.0)


def _unstandardised(
    weight: np.ndarray, mean: np.ndarray, centre: np.ndarray, scale: np.ndarray, penalty: float
) -> Linear:
    weight = weight / scale[:, None]
    return Linear(weight, centre - mean @ weight, penalty)


def best_fit(fits: Iterable[Linear], x_val: np.ndarray, y_val: np.ndarray) -> Linear:
    """The fit with the smallest squared error on validation rows; ties go to the stronger penalty.

    Args:
        x_val: Features, shape ``(rows, features)``.
        y_val: Targets, shape ``(rows, targets)``.
    """
    return min(fits, key=lambda fit: (float(np.square(fit(x_val) - y_val).sum()), -fit.penalty))


def chosen_classifier(
    x: np.ndarray,
    labels: np.ndarray,
    x_val: np.ndarray,
    labels_val: np.ndarray,
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> Linear:
    """Ridge on targets of -1 and 1, one against all; the penalty with the highest validation accuracy.

    Args:
        x: Features to fit on, shape ``(rows, features)``.
        x_val: Features to choose on.
        penalties: As for `ridge_fits`; of equal accuracies the stronger is taken.

    Source:
        The few-shot probe of big_vision, ``evaluators/fewshot_lsr.py``.
    """
    fits = ridge_fits(x, one_against_all(labels, num_classes), penalties)
    return max(fits, key=lambda fit: (int((fit(x_val).argmax(axis=1) == labels_val).sum()), fit.penalty))


def one_against_all(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Targets of a classifier by least squares: 1 for the class, -1 for the others.

    Args:
        labels: int, shape ``(rows,)``.
    """
    return 2.0 * np.eye(num_classes)[labels] - 1


def moments_of(chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Moments:
    """Moments of rows that come in chunks, in one pass.

    Args:
        chunks: Features, shape ``(rows, features)``, and targets, shape ``(rows, targets)``; at least one.
    """
    count = 0
    shift_x = shift_y = sum_x = sum_y = xx = xy = np.zeros(0)
    for x, y in chunks:
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if not count:
            # Sums are of differences to a value near the mean, or squares would cancel.
            shift_x, shift_y = x.mean(axis=0), y.mean(axis=0)
            sum_x, sum_y = np.zeros_like(shift_x), np.zeros_like(shift_y)
            xx, xy = np.zeros((x.shape[1], x.shape[1])), np.zeros((x.shape[1], y.shape[1]))
        x, y = x - shift_x, y - shift_y
        count += len(x)
        sum_x, sum_y = sum_x + x.sum(axis=0), sum_y + y.sum(axis=0)
        xx += x.T @ x
        xy += x.T @ y
    assert count, "moments of no rows"
    xx = xx - np.outer(sum_x, sum_x) / count
    xy = xy - np.outer(sum_x, sum_y) / count
    scale = scale_of(np.diag(xx) / count)
    mean_x, mean_y = shift_x + sum_x / count, shift_y + sum_y / count
    return Moments(count, mean_x, mean_y, scale, xx / np.outer(scale, scale), xy / scale[:, None])


def r2(errors: np.ndarray, totals: np.ndarray) -> float:
    """Share of variance explained, over all images together: 1 is exact, 0 is no better than the mean.

    Args:
        errors: Squared error of each image.
        totals: Squared distance of each image from the training mean; the answer is NaN where all are 0.

    Example:
        >>> r2(np.array([1.0, 0.0]), np.array([2.0, 2.0]))
        0.75
    """
    total = float(totals.sum())
    return 1 - float(errors.sum()) / total if total > 0 else math.nan


def r2_scores(errors: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """A score for each image whose mean is `r2`, and whose variance over images is that of a ratio of sums.

    ``1 - (e_i - (1 - r2) * (t_i - t)) / t``, with errors ``e_i``, totals ``t_i`` and their mean ``t``: images
    that vary much have large errors, and that they are in the sample or not moves both sums.

    Args:
        errors: As for `r2`.
        totals: As for `r2`; not all 0.

    Source:
        Linearisation of a ratio: Cochran 1977, Sampling Techniques, section 6.3.
    """
    mean = float(totals.mean())
    left = 1 - r2(errors, totals)
    return 1 - (errors - left * (totals - mean)) / mean
