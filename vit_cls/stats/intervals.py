"""Confidence intervals, the bootstrap, permutation tests, and the correction for several tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import binomtest, norm

from vit_cls.errors import DataError

ALPHA = 0.05
POWER = 0.8
Z = float(norm.ppf(1 - ALPHA / 2))
RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50
"""So many rows of counts are held at a time: 20 MB for 50,000 images."""


@lru_cache(maxsize=4096)  # a report on a thousand classes asks for few different counts, thousands of times
def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion, in [0, 1].

    Args:
        trials: Of how many; at least 1.

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
    interval = binomtest(successes, trials).proportion_ci(1 - ALPHA, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of columns over resampled rows, shape ``(resamples, columns)``; every column sees the same rows.

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


def percentile_interval(samples: np.ndarray, *, lower: float = 0.5 - 0.95 / 2) -> tuple[float, float]:
    """The middle 95 % of a bootstrap distribution.

    The share below is 0.025; its rounding decides the last digit, so each statistic keeps its own.
    """
    low, high = np.quantile(samples, [lower, 1 - ALPHA / 2])
    return float(low), float(high)


def permutation_p(observed: float, null_draws: np.ndarray) -> float:
    """One-sided p-value of a permutation test; large values speak against the null hypothesis.

    Args:
        null_draws: The statistic on data permuted at random, shape ``(draws,)``.

    Returns:
        ``(1 + draws at or above observed) / (1 + draws)``: never 0, as the data are one permutation too.

    Raises:
        DataError: If there are no draws, or a value is not finite.

    Example:
        >>> permutation_p(2.0, np.array([0.0, 1.0, 2.0, 1.5]))
        0.4

    Source:
        Phipson and Smyth 2010, https://doi.org/10.2202/1544-6115.1585.
    """
    draws = np.asarray(null_draws, dtype=np.float64)
    if draws.size == 0 or not np.isfinite(draws).all() or not math.isfinite(observed):
        raise DataError(
            f"a permutation test needs finite values and at least one draw; got {observed} observed and "
            f"{draws.size} draws. Raise the number of permutations, or see why the statistic is not finite."
        )
    return float((1 + (draws >= observed).sum()) / (1 + draws.size))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false claim among them stays at the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return adjusted
