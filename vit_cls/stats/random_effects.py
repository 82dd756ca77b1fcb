"""Differences and means of scores over seeds and images, both random: two-way random effects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit  # a hundred times as fast as scipy.stats.t.ppf

from vit_cls.errors import ConfigError, DataError
from vit_cls.stats.intervals import ALPHA, Z, wilson_interval
from vit_cls.stats.paired import (
    FEW_DISCORDANT,
    PAIRED_RESAMPLES,
    difference_interval,
    mcnemar_mid_p,
    score_equivalence_p,
)

SMALLEST_P = 1e-100
NARROWEST = 0.5
"""No interval is narrower than this share of the one that images alone give.

A few seeds agree by luck as often as they disagree. Half keeps the coverage of three seeds without any effect
of their own at 96 %; all of it would make that 99 %."""


@dataclass(frozen=True)
class Variance:
    """What the squared standard error of a mean over seeds and images is made of.

    Args:
        seeds: Variance of the seeds' means over their number, residual included; 0 for one seed.
        images: Variance of the images' means over their number, less the residual.
        residual: What neither explains, over the number of scores.
    """

    seeds: float
    images: float
    residual: float


@dataclass(frozen=True)
class Difference:
    """Mean of B minus A over seeds and images.

    Args:
        estimate: In the unit of the scores.
        p: Two-sided p-value of no difference. At 0.05 or below 0 lies outside ``ci95``, and not else; with
            one seed of right or wrong, the two come from different methods and may disagree at the edge.
        standard_error: Never 0 where the scores vary at all.
        seed_sd: Standard deviation of the differences of the seeds; None for one seed.
        method: How interval and p-value came about, in words.
        discordant: Images that A alone and that B alone had right, where it is one seed of right or wrong.
    """

    estimate: float
    ci95: tuple[float, float]
    p: float
    standard_error: float
    seeds: int
    images: int
    seed_sd: float | None
    method: str
    variance: Variance
    discordant: tuple[int, int] | None = None

    @property
    def holds_for(self) -> str:
        """What the interval speaks of: retraining is in it only where there are several seeds."""
        return "this one training" if self.seeds == 1 else "training with this recipe"

    def tail(self, distance: float) -> float:
        """One-sided p-value of an estimate so far beyond a hypothesis; a positive distance contradicts it."""
        if self.standard_error == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        ratio = distance / self.standard_error
        upper = _tail(abs(ratio), self.quantile)
        return upper if ratio >= 0 else 1 - upper

    def quantile(self, q: float) -> float:
        """Of the distribution of the estimate's error, in standard errors; ``q`` in (0, 1)."""
        return weighted_t(q, self.variance.seeds, self.variance.images, self.seeds, self.images)


@dataclass(frozen=True)
class Mean:
    """Mean score over seeds and images.

    Args:
        seed_sd: Standard deviation of the means of the seeds; None for one seed.
        method: How the interval came about, in words.
    """

    estimate: float
    ci95: tuple[float, float]
    standard_error: float
    seeds: int
    images: int
    seed_sd: float | None
    method: str


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, seed: int = 0, resamples: int = PAIRED_RESAMPLES
) -> Difference:
    """Compare two methods on the same images, each under the same seeds; second minus first.

    One seed, right or wrong: McNemar's mid-p test; the paired bootstrap for the interval, or Tango's score
    interval where few images tell the methods apart.

    Else seeds and images are crossed random effects, and only the differences of pairs are looked at. The
    squared standard error is ``seeds + images``: the variance of the means of the seeds over their number,
    plus that of the means of the images over theirs, less the residual, which the first contains. It is
    multiplied by the t quantiles of ``seeds - 1`` and ``images - 1`` degrees of freedom, weighted by the two
    parts: percentiles of three resampled seeds would cover far less than they say.

    One more image of the typical squared size is assumed. Where fewer than ten images differ from the rest,
    it has at least a weight of ``1.96**2`` at the full range of the scores, less a tenth for each of them:
    without any, the interval is as wide as a score interval.

    Args:
        a: Scores of the one, shape ``(seeds, images)`` or ``(images,)``; bool (right or not) or float.
        b: Scores of the other; row by row the seeds of ``a``, column by column its images.
        seed: Of the bootstrap, which is used with one seed of bool scores only.

    Raises:
        DataError: If the shapes or types differ, a score is not finite, or there are fewer than two images.

    Example:
        >>> a = np.array([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]], dtype=bool)
        >>> b = np.array([[1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]], dtype=bool)
        >>> difference = paired_difference(a, b)
        >>> round(difference.estimate, 4), difference.seeds, difference.images, difference.holds_for
        (0.3333, 2, 6, 'training with this recipe')

    Source:
        Variance with crossed effects: Owen 2007, https://doi.org/10.1214/07-AOAS122. Weighted t: Cochran
        1964, Biometrics 20(1), 191-195. Assumed images: Agresti and Min 2005,
        https://doi.org/10.1002/sim.1781.
    """
    a, b = _scores(a, "a"), _scores(b, "b")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise DataError(
            f"a and b must be scores of the same seeds and images, both right-or-wrong or both numbers; "
            f"got shapes {a.shape} and {b.shape} of {a.dtype} and {b.dtype}. "
            "Pair the rows by seed and the columns by image."
        )
    scores = np.stack([a, b]).astype(np.float64)
    score_range = 1.0 if a.dtype == bool else float(scores.max() - scores.min())
    difference = two_way_random_effects(b.astype(np.float64) - a, score_range)
    if a.dtype == bool and len(a) == 1:
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        return _one_seed(difference, only_a, only_b, seed=seed, resamples=resamples)
    return difference


def _one_seed(difference: Difference, only_a: int, only_b: int, *, seed: int, resamples: int) -> Difference:
    """The same difference with the interval and the test of two classifiers on the same images."""
    counts = np.array([only_a]), np.array([only_b]), np.array([difference.images])
    few = only_a + only_b < FEW_DISCORDANT
    return replace(
        difference,
        ci95=difference_interval(*counts, seed=seed, resamples=resamples),
        p=mcnemar_mid_p(only_a, only_b),
        method=f"McNemar's mid-p test, {'score' if few else 'paired bootstrap'} interval",
        discordant=(only_a, only_b),
    )


def mean_interval(values: np.ndarray) -> Mean:
    """Mean of the scores of one method, as `paired_difference` does it; Wilson's interval for one seed.

    Args:
        values: Shape ``(seeds, images)`` or ``(images,)``; bool (right or not) or float.

    Raises:
        DataError: If a score is not finite, or there are fewer than two images.
    """
    checked = _scores(values, "values")
    numbers, right = checked.astype(np.float64), checked.dtype == bool
    mean = two_way_random_effects(numbers, 1.0 if right else float(numbers.max() - numbers.min()))
    low, high, method = *mean.ci95, mean.method
    if right:
        low, high = max(0.0, low), min(1.0, high)
        if len(numbers) == 1:
            low, high = wilson_interval(int(checked.sum()), checked.size)
            method = "Wilson's interval"
    return Mean(
        mean.estimate, (low, high), mean.standard_error, mean.seeds, mean.images, mean.seed_sd, method
    )


def equivalence_p(difference: Difference, margin: float) -> float:
    """Two one-sided tests of a difference as large as the margin, or larger: the larger p-value of the two.

    Source:
        Schuirmann 1987, https://doi.org/10.1007/BF01068419.
    """
    check_margin(margin)
    if difference.discordant is not None and margin < 1:
        return score_equivalence_p(*difference.discordant, difference.images, margin)
    return max(difference.tail(margin - difference.estimate), difference.tail(difference.estimate + margin))


def check_margin(margin: float) -> None:
    """Raise ConfigError for a margin that is not above 0."""
    if not (math.isfinite(margin) and margin > 0):
        raise ConfigError(
            f"margin must be above 0: the largest difference that does not matter; got {margin}. "
            "Scores are shares: write 0.01 for one point."
        )


def _scores(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise DataError(
            f"{name} must be scores of at least two images, shape (seeds, images); got {np.shape(values)}."
        )
    array = array if array.dtype == bool else array.astype(np.float64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise DataError(
            f"{name} must be finite; {bad} of {array.size} scores are not. "
            "Leave those images out of both, and count them."
        )
    return array


def two_way_random_effects(values: np.ndarray, score_range: float) -> Difference:
    """The mean of scores, or of differences of pairs, shape ``(seeds, images)``, as `paired_difference` tells
    it.
    """
    seeds, images = values.shape
    rows, columns, estimate = values.mean(axis=1), values.mean(axis=0), float(values.mean())
    deviations = columns - estimate
    squares = float((deviations**2).sum())
    of_seeds = float(rows.var(ddof=1)) / seeds if seeds > 1 else 0.0
    residual = 0.0
    if seeds > 1:
        rest = values - rows[:, None] - columns + estimate
        residual = float((rest**2).sum()) / ((seeds - 1) * (images - 1) * seeds * images)
    unlike = images - int(np.unique(columns, return_counts=True)[1].max())
    typical = float((deviations**4).sum()) / squares if squares > 0 else 0.0
    assumed = max(typical, max(0.0, 1 - unlike / FEW_DISCORDANT) * (Z * score_range) ** 2)
    images_alone = squares / (images * (images - 1)) + assumed / images**2
    variance = Variance(of_seeds, max(0.0, images_alone - residual), residual)
    error = math.sqrt(variance.seeds + variance.images)
    factor = weighted_t(1 - ALPHA / 2, variance.seeds, variance.images, seeds, images)
    error = max(error, NARROWEST * Z * math.sqrt(images_alone) / factor)
    half = factor * error
    difference = Difference(
        estimate, (estimate - half, estimate + half), 1.0, error, seeds, images,
        float(rows.std(ddof=1)) if seeds > 1 else None,
        "t interval, images random" if seeds == 1 else "weighted t interval, seeds and images random",
        variance,
    )  # fmt: skip
    return replace(difference, p=min(1.0, 2 * difference.tail(abs(estimate))))


def weighted_t(q: float, of_seeds: float, of_images: float, seeds: int, images: int) -> float:
    """Mean of the t quantiles of seeds and of images, weighted by their variances: Cochran 1964."""
    total = of_seeds + of_images
    share = of_seeds / total if total > 0 else 0.0
    value = (1 - share) * float(stdtrit(images - 1, q))
    return value + share * float(stdtrit(seeds - 1, q)) if share > 0 else value


def _tail(ratio: float, quantile: Callable[[float], float]) -> float:
    """Upper tail beyond ``ratio``, at least 0, by inverting the quantile function, which is symmetric."""

    def gap(log_p: float) -> float:
        return -quantile(math.exp(log_p)) - ratio

    if gap(math.log(SMALLEST_P)) <= 0:
        return SMALLEST_P
    if gap(math.log(0.5)) >= 0:
        return 0.5
    return math.exp(brentq(gap, math.log(SMALLEST_P), math.log(0.5), xtol=1e-10))
