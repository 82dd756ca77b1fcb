"""Minimum detectable effect and required sample size, of a test at 5 % with a power of 80 %."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.stats import norm

from vit_cls import formatting as fmt
from vit_cls.stats.intervals import ALPHA, POWER
from vit_cls.stats.paired import null_variance
from vit_cls.stats.random_effects import Difference, check_margin, weighted_t

MOST_SEEDS = 10_000
MOST_IMAGES = 1_000_000_000


def mcnemar_detectable_effect(images: int, discordance: float) -> float:
    """The minimum detectable effect between two models on the same images; 1 where these are too few.

    It solves ``images * d**2 = (z1 * sqrt(s) + z2 * sqrt(s - d**2))**2`` for ``d``, where ``s`` is the
    discordance, ``z1 = 1.96`` and ``z2 = 0.84``. No difference exceeds the discordance: where the solution
    would, all of the discordance is on one side, and ``s`` is ``d``.

    Args:
        discordance: Share of images that one model alone classified right, in [0, 1].

    Example:
        >>> round(mcnemar_detectable_effect(540, 0.03), 3)
        0.021

    Source:
        Connor 1987, https://doi.org/10.2307/2531961, solved for the difference.
    """
    z1, z2 = float(norm.ppf(1 - ALPHA / 2)), float(norm.ppf(POWER))
    n, below = images, images - z1 * z1
    if below <= 0:
        return 1.0
    scale = z2 * z2 + n
    effect = math.sqrt(discordance) * (z1 * math.sqrt(n) + z2 * math.sqrt(below + z2 * z2)) / scale
    if 0 < effect <= discordance:
        return effect
    root = (math.sqrt((z1 * z2) ** 2 + scale * below) - z1 * z2) / scale
    return 1 - root * root


def mcnemar_required_images(
    only_a: int, only_b: int, images: int, margin: float, *, alpha: float = ALPHA
) -> int:
    """How many images would settle it between two models, should the observed shares be the true ones.

    Settled is: the difference found, by Connor's ``n = ((z1 * sqrt(s) + z2 * sqrt(s - d**2)) / d)**2``, or
    equivalence shown, by ``n = ((z1 * sqrt(v) + z2 * sqrt(s - d**2)) / (margin - abs(d)))**2``, ``v`` being
    the variance at the margin; the smaller counts. ``d`` is the difference and ``s`` the discordance.

    Args:
        only_a: Images that the first model alone classified right; ``only_b`` that the second alone did.
        margin: The largest difference that does not matter, in (0, 1).

    Source:
        Connor 1987, https://doi.org/10.2307/2531961; for equivalence, Tango 1998, section 4, with half of the
        remaining 20 % for each side.
    """
    share_a, share_b = sorted((only_a / images, only_b / images))
    difference, discordance = share_b - share_a, share_a + share_b
    spread = math.sqrt(discordance - difference * difference)
    required = math.inf
    if difference > 0:
        both = norm.ppf(1 - alpha / 2) * math.sqrt(discordance) + norm.ppf(POWER) * spread
        required = (both / difference) ** 2
    if difference < margin:
        variance = null_variance(share_a, share_b, margin)
        both = norm.ppf(1 - alpha) * math.sqrt(variance) + norm.ppf((1 + POWER) / 2) * spread
        required = min(required, (both / (margin - difference)) ** 2)
    return math.ceil(required)


def minimum_detectable_effect(difference: Difference) -> float:
    """The smallest difference that a two-sided test at 5 % finds with a power of 80 %, in the unit of the
    scores.

    Source:
        Bloom 1995, https://doi.org/10.1177/0193841X9501900504; one seed of right or wrong: Connor 1987.
    """
    if difference.discordant is not None:
        return mcnemar_detectable_effect(difference.images, sum(difference.discordant) / difference.images)
    return (difference.quantile(1 - ALPHA / 2) + difference.quantile(POWER)) * difference.standard_error


def required_sample_size(
    difference: Difference, margin: float, *, null: float | None = 0.0, alpha: float = ALPHA
) -> str:
    """How much data would settle it with a power of 80 %, in words, should estimate and variances be the true
    ones.

    Args:
        margin: The largest difference that does not matter, above 0; to show it settles the question too.
        null: What the difference is to be told from; None: showing the margin alone settles it.
        alpha: Level of the tests; divide it by the number of claims where there are several.

    Raises:
        ConfigError: If the margin is not above 0.
    """
    check_margin(margin)
    seeds, images = difference.seeds, difference.images
    if seeds == 1:
        if difference.discordant is not None and null == 0 and margin < 1:
            more: int | None = mcnemar_required_images(*difference.discordant, images, margin, alpha=alpha)
        else:
            more = _first(lambda n: _settles(difference, margin, null, alpha, 1, n), images, MOST_IMAGES)
        count = (
            "more images than there are" if more is None else f"about {_about(max(more, images + 1))} images"
        )
        return f"{count} for this one training, and several seeds to speak of the recipe"
    rows = _first(lambda s: _settles(difference, margin, null, alpha, s, images), seeds, MOST_SEEDS)
    columns = _first(lambda n: _settles(difference, margin, null, alpha, seeds, n), images, MOST_IMAGES)
    with_seeds, with_images = f"with these {seeds} seeds", f"with these {fmt.count(images)} images"
    if rows and columns:
        return f"about {_about(rows)} seeds {with_images}, or {_about(columns)} images {with_seeds}"
    if rows:
        floor = f"no number of images alone {with_seeds}, which differ too much"
        return f"about {_about(rows)} seeds {with_images}; {floor}"
    if columns:
        return f"about {_about(columns)} images {with_seeds}; no number of seeds alone {with_images}"
    return f"more seeds and more images together; neither alone, {with_seeds} or {with_images}"


def _settles(
    difference: Difference, margin: float, null: float | None, alpha: float, seeds: int, images: int
) -> bool:
    """Whether so many seeds and images have a power of 80 %, with the variances of the difference."""
    variance = difference.variance
    residual = variance.residual * difference.seeds * difference.images / (seeds * images)
    effect = max(0.0, variance.seeds - variance.residual) * difference.seeds / seeds
    of_seeds = effect + residual if difference.seeds > 1 else 0.0
    of_images = variance.images * difference.images / images
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
    return fmt.count(math.ceil(count / step) * step)
