"""The share of variance explained, as a score for each image, to be compared like any other score."""

from __future__ import annotations

import math

import numpy as np

R2_UNIT = "of R2"


def r2(errors: np.ndarray, totals: np.ndarray) -> float:
    """Share of variance explained, over all images together.

    Args:
        errors: Squared error of each image, shape ``(images,)``.
        totals: Squared distance of each image from the training mean, shape ``(images,)``.

    Returns:
        One less the ratio of the sums: 1 is exact, 0 is no better than the mean; NaN where nothing varies.

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

    Returns:
        float64, shape ``(images,)``.

    Example:
        >>> r2_scores(np.array([1.0, 3.0]), np.array([2.0, 6.0]))  # half of each: nothing varies
        array([0.5, 0.5])

    Source:
        Linearisation of a ratio: Cochran 1977, Sampling Techniques, section 6.3.
    """
    mean = float(totals.mean())
    left = 1 - r2(errors, totals)
    return 1 - (errors - left * (totals - mean)) / mean
