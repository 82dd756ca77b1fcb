"""Statistics of two classifiers on the same images, from the counts of who alone was right."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

from vit_cls.stats.intervals import ALPHA, percentile_interval

PAIRED_RESAMPLES = 10_000
FEW_DISCORDANT = 10
"""Below it resamples take too few values: the bootstrap would cover less than it says."""


def mcnemar_mid_p(only_a: int, only_b: int) -> float:
    """McNemar's exact test with the mid-p correction, two-sided; 1 where the counts are equal.

    Args:
        only_a: Images that the first model alone classified right; ``only_b`` that the second alone did.

    Example:
        >>> round(mcnemar_mid_p(2, 10), 6)  # (2 * (1 + 12 + 66) - 66) / 2 ** 12
        0.022461

    Source:
        Fagerland, Lydersen and Laake 2013, https://doi.org/10.1186/1471-2288-13-91.
    """
    if only_a == only_b:
        return 1.0
    fewer, trials = min(only_a, only_b), only_a + only_b
    return float(2 * binom.cdf(fewer, trials, 0.5) - binom.pmf(fewer, trials, 0.5))


def difference_interval(
    only_a: np.ndarray,
    only_b: np.ndarray,
    images: np.ndarray,
    *,
    seed: int,
    resamples: int = PAIRED_RESAMPLES,
) -> tuple[float, float]:
    """95 % confidence interval of the difference of two accuracies on the same images, second minus first.

    The paired percentile bootstrap, each class resampled on its own. An image has one of three outcomes (one
    right, the other right, no difference), so the counts of a resample are a multinomial draw. From ``n``
    images of a class ``n - 1`` are drawn and weighted by ``n / (n - 1)``, or small classes would make the
    interval too narrow; classes of one image are resampled together. With fewer than `FEW_DISCORDANT` images
    that tell the models apart, `score_interval` takes its place.

    Args:
        only_a: Images that the first model alone classified right, by class.
        only_b: Images that the second alone did, by class.
        images: All images, by class, each at least 1.
        seed: Of the resampling. Exchanging the models mirrors the interval.

    Source:
        Efron and Tibshirani 1993, chapter 13; ``n - 1`` draws: Rao and Wu 1988,
        https://doi.org/10.1080/01621459.1988.10478591.
    """
    total = int(images.sum())
    if only_a.sum() + only_b.sum() < FEW_DISCORDANT:
        return score_interval(int(only_a.sum()), int(only_b.sum()), total)
    if [int(only_b.sum()), *only_b] < [int(only_a.sum()), *only_a]:
        low, high = difference_interval(only_b, only_a, images, seed=seed, resamples=resamples)
        return -high, -low
    rng = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for a, b, n in _strata(only_a, only_b, images):
        if a + b == 0 or n == 1:
            sums += b - a
            continue
        drawn = rng.multinomial(n - 1, [a / n, b / n, (n - a - b) / n], size=resamples)
        sums += (drawn[:, 1] - drawn[:, 0]) * (n / (n - 1))
    low, high = percentile_interval(sums / total, lower=ALPHA / 2)
    return max(-1.0, low), min(1.0, high)


def _strata(only_a: np.ndarray, only_b: np.ndarray, images: np.ndarray) -> list[tuple[int, int, int]]:
    """Counts of each class of two or more images, then of all the single images together."""
    table = np.stack([only_a, only_b, images], axis=1)
    single = table[:, 2] == 1
    rows = [*table[~single], *([table[single].sum(axis=0)] if single.any() else [])]
    return [(int(a), int(b), int(n)) for a, b, n in rows]


def score_interval(
    only_a: int, only_b: int, images: int, *, confidence: float = 1 - ALPHA
) -> tuple[float, float]:
    """Tango's score interval of the difference of two accuracies, second minus first; not of width zero where
    the counts are.

    Source:
        Tango 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B.
    """
    z, estimate = float(norm.ppf(0.5 + confidence / 2)), (only_b - only_a) / images

    def bound(sign: int) -> float:
        """Below the estimate for 1, above it for -1: where the statistic is that many times ``z``."""

        def gap(delta: float) -> float:
            return _score_statistic(only_a, only_b, images, delta) - sign * z

        near, end = estimate - sign * 1e-9, -sign * (1 - 1e-9)
        if abs(near) >= abs(end) or gap(near) * gap(end) >= 0:
            return -float(sign)
        return float(brentq(gap, near, end))

    return bound(1), bound(-1)


def score_equivalence_p(only_a: int, only_b: int, images: int, margin: float) -> float:
    """Two one-sided score tests of a difference as large as the margin, or larger: the larger p-value of the
    two.

    At 0.05 or below, the 90 % `score_interval` lies within the margin.

    Args:
        margin: The largest difference that does not matter, in (0, 1).

    Source:
        Two one-sided tests: Schuirmann 1987, https://doi.org/10.1007/BF01068419; the statistic: Tango 1998.
    """
    above = norm.cdf(_score_statistic(only_a, only_b, images, margin))
    below = norm.sf(_score_statistic(only_a, only_b, images, -margin))
    return float(max(above, below))


def _score_statistic(only_a: int, only_b: int, images: int, delta: float) -> float:
    """Tango 1998, equation 6: distance of the difference from ``delta``, in its standard errors there."""
    variance = null_variance(only_a / images, only_b / images, delta)
    return ((only_b - only_a) / images - delta) * math.sqrt(images / variance)


def null_variance(share_a: float, share_b: float, delta: float) -> float:
    """Variance of one image's difference where its mean is ``delta``, the rest by maximum likelihood."""
    linear = -share_b - share_a + (2 - share_b + share_a) * delta
    constant = -share_a * delta * (1 - delta)
    alone = (math.sqrt(max(0.0, linear * linear - 8 * constant)) - linear) / 4
    return 2 * alone + delta * (1 - delta)
