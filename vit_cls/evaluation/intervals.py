"""Confidence intervals: of proportions in closed form, of the rest by resampling images."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50
"""So many rows of counts are held at a time: 20 MB for 50,000 images."""


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        successes: How many succeeded.
        trials: Of how many; at least 1.
        confidence: Coverage, in (0, 1).

    Returns:
        Lower and upper bound, in [0, 1].

    Raises:
        ValueError: If the counts are impossible.

    Example:
        >>> lower, upper = wilson_interval(96, 100)
        >>> round(lower, 4), round(upper, 4)
        (0.9016, 0.9843)

    Source:
        Wilson 1927; Brown, Cai and DasGupta 2001, https://doi.org/10.1214/ss/1009213286.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"need 0 <= successes <= trials and trials >= 1; got {successes} of {trials}.")
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At 0 and 1 the bound is exact; rounding must not put the estimate outside its interval.
    lower = 0.0 if successes == 0 else max(0.0, centre - half)
    upper = 1.0 if successes == trials else min(1.0, centre + half)
    return lower, upper


def bootstrap_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of columns over resampled rows; every column sees the same resamples.

    Args:
        values: One row an image, one column a quantity, shape ``(images, columns)``.
        resamples: How often as many rows are drawn as there are, with replacement.
        seed: Which draws.

    Returns:
        float64, shape ``(resamples, columns)``.

    Example:
        >>> bootstrap_means(np.array([[1.0, 5.0], [1.0, 5.0]]), resamples=2)
        array([[1., 5.],
               [1., 5.]])

    Source:
        Efron 1979, https://doi.org/10.1214/aos/1176344552.
    """
    rng = np.random.default_rng(seed)
    rows = len(values)
    sums = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        draws = range(min(RESAMPLES_AT_ONCE, resamples - start))
        times = np.stack([np.bincount(rng.integers(0, rows, rows), minlength=rows) for _ in draws])
        sums.append(times.astype(np.float64) @ values)
    return np.concatenate(sums) / rows


def percentile_interval(samples: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float]:
    """The middle of a bootstrap distribution.

    Args:
        samples: The statistic in each resample.
        confidence: Coverage, in (0, 1).
    """
    low, high = np.quantile(samples, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
