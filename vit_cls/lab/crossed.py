"""The mean of scores over seeds and images, both random: its standard error and its t distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit  # a hundred times as fast as scipy.stats.t.ppf
from scipy.stats import norm

from vit_cls.evaluation.paired import ALPHA, FEW_DISCORDANT

Z = float(norm.ppf(1 - ALPHA / 2))
SMALLEST_P = 1e-100
NARROWEST = 0.5
"""No interval is narrower than this share of the one that images alone give.

A few seeds agree by luck as often as they disagree. Half keeps the coverage of three seeds without any
effect of their own at 96 %; all of it would make that 99 %."""


@dataclass(frozen=True)
class Variance:
    """What the squared standard error of a mean over seeds and images is made of.

    Args:
        seeds: Variance of the means of the seeds, over the number of seeds; 0 for one seed. It contains the
            residual.
        images: Variance of the means of the images, over the number of images, less the residual.
        residual: What neither explains, over the number of scores. Counted in ``seeds``.
    """

    seeds: float
    images: float
    residual: float


@dataclass(frozen=True)
class Difference:
    """Mean of B minus A over seeds and images.

    Args:
        estimate: The mean, in the unit of the scores.
        ci95: Its 95 % interval.
        p: Two-sided p-value of no difference. At 0.05 or below 0 lies outside ``ci95``, and not else; with
            one seed of right or wrong, the two come from different methods and may disagree at the edge.
        standard_error: Of the estimate; never 0 where the scores vary at all.
        degrees_of_freedom: Of the t distribution that has the same 97.5 % point as the mixture used.
        seeds: How many.
        images: How many.
        seed_sd: Standard deviation of the differences of the seeds; None for one seed.
        method: How interval and p-value came about, in words.
        variance: The parts of the standard error.
        alone: Images that A alone and that B alone had right; None unless it is one seed of right or wrong.
    """

    estimate: float
    ci95: tuple[float, float]
    p: float
    standard_error: float
    degrees_of_freedom: float
    seeds: int
    images: int
    seed_sd: float | None
    method: str
    variance: Variance
    alone: tuple[int, int] | None = None

    @property
    def holds_for(self) -> str:
        """What the interval speaks of: retraining is in it only where there are several seeds."""
        return "this one training" if self.seeds == 1 else "training with this recipe"

    def tail(self, distance: float) -> float:
        """One-sided p-value of an estimate so far on the other side of a hypothesis.

        Args:
            distance: Estimate minus hypothesis, in the unit of the scores; positive contradicts it.
        """
        if self.standard_error == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        ratio = distance / self.standard_error
        upper = _tail(abs(ratio), self.quantile)
        return upper if ratio >= 0 else 1 - upper

    def quantile(self, q: float) -> float:
        """Of the distribution of the estimate's error, in standard errors.

        Args:
            q: In (0, 1).
        """
        return weighted_t(q, self.variance.seeds, self.variance.images, self.seeds, self.images)


def crossed(values: np.ndarray, reach: float) -> Difference:
    """The mean of scores, or of differences of pairs, with seeds and images as crossed random effects.

    The method is told in `vit_cls.lab.statistics.paired_difference`.

    Args:
        values: float64, shape ``(seeds, images)``, at least two images.
        reach: The largest that one difference could be: the range of the scores.
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
    assumed = max(typical, max(0.0, 1 - unlike / FEW_DISCORDANT) * (Z * reach) ** 2)
    alone = squares / (images * (images - 1)) + assumed / images**2
    variance = Variance(of_seeds, max(0.0, alone - residual), residual)
    error = math.sqrt(variance.seeds + variance.images)
    factor = weighted_t(1 - ALPHA / 2, variance.seeds, variance.images, seeds, images)
    error = max(error, NARROWEST * Z * math.sqrt(alone) / factor)
    half = factor * error
    found = Difference(
        estimate, (estimate - half, estimate + half), 1.0, error,
        _matching_degrees(factor, seeds, images), seeds, images,
        float(rows.std(ddof=1)) if seeds > 1 else None,
        "t interval, images random" if seeds == 1 else "weighted t interval, seeds and images random",
        variance,
    )  # fmt: skip
    return replace(found, p=min(1.0, 2 * found.tail(abs(estimate))))


def weighted_t(q: float, of_seeds: float, of_images: float, seeds: int, images: int) -> float:
    """Mean of the t quantiles with the degrees of freedom of the seeds and of the images, by their variances.

    Args:
        q: Which quantile, in (0, 1).
        of_seeds: Variance of the mean that goes with the seeds; 0 for one seed.
        of_images: Variance that goes with the images.
        seeds: How many.
        images: How many, at least two.

    Source:
        Cochran 1964, Biometrics 20(1), 191-195.
    """
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


def _matching_degrees(factor: float, seeds: int, images: int) -> float:
    low, high = min(max(1, seeds - 1), images - 1), max(max(1, seeds - 1), images - 1)

    def gap(degrees: float) -> float:
        return float(stdtrit(degrees, 1 - ALPHA / 2)) - factor

    if gap(high) >= 0 or gap(low) <= 0:
        return float(high if gap(high) >= 0 else low)
    return float(brentq(gap, low, high, xtol=1e-6))
