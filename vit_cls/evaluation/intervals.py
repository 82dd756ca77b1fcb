"""Confidence intervals of proportions."""

from __future__ import annotations

import math

from scipy.stats import norm


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
