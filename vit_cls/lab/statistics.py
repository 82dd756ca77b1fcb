"""Differences and means of per-image scores over seeds and images, with intervals that keep their promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vit_cls.errors import ConfigError, DataError
from vit_cls.evaluation import paired
from vit_cls.evaluation.intervals import wilson_interval
from vit_cls.evaluation.paired import ALPHA, FEW_DISCORDANT, POWER, RESAMPLES
from vit_cls.lab.crossed import Difference, crossed, weighted_t

MOST_SEEDS = 10_000
MOST_IMAGES = 1_000_000_000


@dataclass(frozen=True)
class Mean:
    """Mean score over seeds and images.

    Args:
        estimate: The mean.
        ci95: Its 95 % interval.
        standard_error: Of the mean.
        seeds: How many.
        images: How many.
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
    a: np.ndarray, b: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Compare two ways on the same images, each under the same seeds.

    One seed, right or wrong: McNemar's mid-p test; the paired bootstrap for the interval, or Tango's score
    interval where few images tell the models apart.

    Else seeds and images are crossed random effects, and only the differences of pairs are looked at. The
    squared standard error is ``seeds + images``: the variance of the means of the seeds over their number,
    plus that of the means of the images over theirs, less the residual, which the first contains. That is
    what a bootstrap of seeds, then images, estimates, but for its counting the residual three times. It
    is multiplied by the t quantiles of ``seeds - 1`` and ``images - 1`` degrees of freedom, weighted by the
    two parts: percentiles of three resampled seeds would cover far less than they say.

    One more image of the typical squared size is assumed. Where fewer than ten images differ from the rest,
    it has at least a weight of ``1.96**2`` at the full range of the scores, less a tenth for each of them:
    without any, the interval is as wide as a score interval.

    Args:
        a: Scores of the one way, shape ``(seeds, images)`` or ``(images,)``; bool (right or not) or float.
        b: Scores of the other; row by row the seeds of ``a``, column by column its images.
        seed: Of the bootstrap, which is used with one seed of bool scores only.
        resamples: How many, there.

    Returns:
        The difference, second minus first.

    Raises:
        DataError: If the shapes or types differ, a score is not finite, or there are fewer than two images.

    Example:
        >>> a = np.array([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]], dtype=bool)
        >>> b = np.array([[1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]], dtype=bool)
        >>> found = paired_difference(a, b)
        >>> round(found.estimate, 4), found.seeds, found.images, found.holds_for
        (0.3333, 2, 6, 'training with this recipe')

    Source:
        Variance with crossed effects and the bootstrap: Owen 2007, https://doi.org/10.1214/07-AOAS122.
        Weighted t: Cochran 1964, Biometrics 20(1), 191-195. Assumed images: Agresti and Min 2005,
        https://doi.org/10.1002/sim.1781.
    """
    a, b = _scores(a, "a"), _scores(b, "b")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise DataError(
            f"a and b must be scores of the same seeds and images, both right-or-wrong or both numbers; "
            f"got shapes {a.shape} and {b.shape} of {a.dtype} and {b.dtype}. "
            "Pair the rows by seed and the columns by image."
        )
    difference = b.astype(np.float64) - a
    scores = np.stack([a, b]).astype(np.float64)
    reach = 1.0 if a.dtype == bool else float(scores.max() - scores.min())
    found = crossed(difference, reach)
    if a.dtype == bool and len(a) == 1:
        return _one_seed(found, int((a & ~b).sum()), int((b & ~a).sum()), seed=seed, resamples=resamples)
    return found


def mean_interval(values: np.ndarray, *, seed: int = 0) -> Mean:
    """Mean of the scores of one way, by the machinery of `paired_difference`; Wilson's interval for one seed.

    Args:
        values: Shape ``(seeds, images)`` or ``(images,)``; bool (right or not) or float.
        seed: Not drawn from: the interval has a closed form. Kept so that callers need not know.

    Raises:
        DataError: If a score is not finite, or there are fewer than two images.

    Example:
        >>> low, high = mean_interval(np.arange(100) < 96).ci95  # Wilson
        >>> round(low, 4), round(high, 4)
        (0.9016, 0.9843)
    """
    del seed
    checked = _scores(values, "values")
    numbers, right = checked.astype(np.float64), checked.dtype == bool
    found = crossed(numbers, 1.0 if right else float(numbers.max() - numbers.min()))
    low, high, method = *found.ci95, found.method
    if right:
        low, high = max(0.0, low), min(1.0, high)
        if len(numbers) == 1:
            low, high = wilson_interval(int(checked.sum()), checked.size)
            method = "Wilson's interval"
    return Mean(
        found.estimate, (low, high), found.standard_error, found.seeds, found.images, found.seed_sd, method
    )


def equivalence_p(difference: Difference, margin: float) -> float:
    """Two one-sided tests of a difference that is as large as the margin, or larger.

    Args:
        difference: Of `paired_difference`.
        margin: The largest difference that does not matter, above 0, in the unit of the scores.

    Returns:
        The larger p-value of the two; score tests with one seed of right or wrong.

    Raises:
        ConfigError: If the margin is not above 0.

    Source:
        Schuirmann 1987, https://doi.org/10.1007/BF01068419.
    """
    _check_margin(margin)
    if difference.alone is not None and margin < 1:
        return paired.equivalence_p(*difference.alone, difference.images, margin)
    return max(difference.tail(margin - difference.estimate), difference.tail(difference.estimate + margin))


def smallest_detectable(difference: Difference) -> float:
    """The smallest difference that a two-sided test at 5 % finds with a power of 80 %, with this much data.

    Args:
        difference: Of `paired_difference`; its seeds, images and spread count, not its size.

    Returns:
        In the unit of the scores: the sum of the 97.5 % and 80 % quantiles, in standard errors.

    Source:
        Bloom 1995, https://doi.org/10.1177/0193841X9501900504; one seed of right or wrong: Connor 1987.
    """
    if difference.alone is not None:
        return paired.smallest_detectable(difference.images, sum(difference.alone) / difference.images)
    return (difference.quantile(1 - ALPHA / 2) + difference.quantile(POWER)) * difference.standard_error


def needed(difference: Difference, margin: float, *, null: float | None = 0.0, alpha: float = ALPHA) -> str:
    """How much data would settle it with a power of 80 %, should estimate and variances be the true ones.

    Args:
        difference: Of `paired_difference`.
        margin: The largest difference that does not matter, above 0; to show it settles the question too.
        null: What the difference is to be told from; None: showing the margin alone settles it.
        alpha: Level of the tests; divide it by the number of claims where there are several.

    Returns:
        Seeds with these images, or images with these seeds, in words; or that one alone cannot do.

    Raises:
        ConfigError: If the margin is not above 0.
    """
    _check_margin(margin)
    seeds, images = difference.seeds, difference.images
    if seeds == 1:
        if difference.alone is not None and null == 0 and margin < 1:
            more: int | None = paired.images_needed(*difference.alone, images, margin, alpha=alpha)
        else:
            more = _first(lambda n: _settles(difference, margin, null, alpha, 1, n), images, MOST_IMAGES)
        count = (
            "more images than there are" if more is None else f"about {_about(max(more, images + 1))} images"
        )
        return f"{count} for this one training, and several seeds to speak of the recipe"
    rows = _first(lambda s: _settles(difference, margin, null, alpha, s, images), seeds, MOST_SEEDS)
    columns = _first(lambda n: _settles(difference, margin, null, alpha, seeds, n), images, MOST_IMAGES)
    with_seeds, with_images = f"with these {seeds} seeds", f"with these {images:,} images"
    if rows and columns:
        return f"about {_about(rows)} seeds {with_images}, or {_about(columns)} images {with_seeds}"
    if rows:
        floor = f"no number of images alone {with_seeds}, which differ too much"
        return f"about {_about(rows)} seeds {with_images}; {floor}"
    if columns:
        return f"about {_about(columns)} images {with_seeds}; no number of seeds alone {with_images}"
    return f"more seeds and more images together; neither alone, {with_seeds} or {with_images}"


def permutation_p(observed: float, null_draws: np.ndarray) -> float:
    """One-sided p-value of a permutation test; large values speak against the null hypothesis.

    Args:
        observed: The statistic on the data.
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
            "Leave those images out of both ways, and count them."
        )
    return array


def _check_margin(margin: float) -> None:
    if not (math.isfinite(margin) and margin > 0):
        raise ConfigError(
            f"margin must be above 0: the largest difference that does not matter; got {margin}. "
            "Scores are shares: write 0.01 for one point."
        )


def _one_seed(found: Difference, only_a: int, only_b: int, *, seed: int, resamples: int) -> Difference:
    counts = np.array([only_a]), np.array([only_b]), np.array([found.images])
    few = only_a + only_b < FEW_DISCORDANT
    return replace(
        found,
        ci95=paired.difference_interval(*counts, seed=seed, resamples=resamples),
        p=paired.mcnemar_mid_p(only_a, only_b),
        method=f"McNemar's mid-p test, {'score' if few else 'paired bootstrap'} interval",
        alone=(only_a, only_b),
    )


def _settles(
    difference: Difference, margin: float, null: float | None, alpha: float, seeds: int, images: int
) -> bool:
    """Whether so many seeds and images have a power of 80 %, with the variances found."""
    found = difference.variance
    residual = found.residual * difference.seeds * difference.images / (seeds * images)
    effect = max(0.0, found.seeds - found.residual) * difference.seeds / seeds
    of_seeds = effect + residual if difference.seeds > 1 else 0.0
    of_images = found.images * difference.images / images
    error = math.sqrt(of_seeds + of_images)

    def quantile(q: float) -> float:
        return weighted_t(q, of_seeds, of_images, seeds, images)

    size = difference.estimate
    if null is not None and abs(size - null) > (quantile(1 - alpha / 2) + quantile(POWER)) * error:
        return True
    # half of the chance of missing it on each side
    return margin - abs(size) > (quantile(1 - alpha) + quantile((1 + POWER) / 2)) * error


def _first(enough: Callable[[int], bool], have: int, most: int) -> int | None:
    """The smallest number above ``have`` that is enough, or None if ``most`` is not."""
    low, high = have, have + 1
    while not enough(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _about(count: int) -> str:
    """Two digits of it, rounded up."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{math.ceil(count / step) * step:,}"
