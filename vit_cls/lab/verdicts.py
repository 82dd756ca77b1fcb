"""Claims stated before measuring, and the verdicts on them, adjusted for how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.evaluation.paired import ALPHA, holm
from vit_cls.lab.crossed import Difference
from vit_cls.lab.results import CANNOT_TELL, EQUIVALENT, REFUTED, SUPPORTED, Finding, in_points
from vit_cls.lab.results import POINTS as POINTS  # for those who claim
from vit_cls.lab.statistics import equivalence_p, needed, paired_difference, smallest_detectable

DIFFERS, GREATER, LESS, EQUAL = "differs", "greater", "less", "equal"
EXPECTATIONS = (DIFFERS, GREATER, LESS, EQUAL)


@dataclass(frozen=True)
class Claim:
    """What is claimed of two ways on the same images, before it is measured.

    Args:
        claim: As a sentence that could be wrong.
        a: Scores of A, shape ``(seeds, images)`` or ``(images,)``; bool (right or not) or float.
        b: Scores of B, of the same seeds and images.
        expect: One of `EXPECTATIONS`; ``greater`` means B above A.
        margin: The largest difference that does not matter, above 0, in the unit of the scores.
        names: Of A and of B.
        unit: ``points``, or a unit that begins with it, writes shares as percentage points; any other unit
            writes the scores as they are.
        at_least: For ``greater`` and ``less``: the size that the claim gives the difference, in the unit of
            the scores; it moves the null hypothesis. Below 0 it claims "no worse than".
        words: What B is than A where it is above, and where it is below.

    Raises:
        ConfigError: If the expectation is unknown, or ``at_least`` has no meaning for it.
    """

    claim: str
    a: np.ndarray
    b: np.ndarray
    expect: str = DIFFERS
    margin: float = 0.01
    names: tuple[str, str] = ("A", "B")
    unit: str = POINTS
    at_least: float = 0.0
    words: tuple[str, str] = ("better", "worse")

    def __post_init__(self) -> None:
        if self.expect not in EXPECTATIONS:
            raise ConfigError(
                f"expect must be one of {', '.join(EXPECTATIONS)}; got {self.expect!r}."
                f"{did_you_mean(self.expect, EXPECTATIONS)}"
            )
        if self.at_least and self.expect not in (GREATER, LESS):
            raise ConfigError(
                f"at_least={self.at_least} goes with expect='greater' or 'less'; got {self.expect!r}. "
                "Leave it out: what is too small to matter is the margin."
            )

    @property
    def null(self) -> float:
        """The difference that the claim is tested against."""
        return -self.at_least if self.at_least and self.expect == LESS else self.at_least


def judge(
    claim: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    expect: str,
    margin: float,
    seed: int = 0,
    names: tuple[str, str] = ("A", "B"),
    unit: str = POINTS,
    at_least: float = 0.0,
    words: tuple[str, str] = ("better", "worse"),
) -> Finding:
    """Verdict on one claim; where there are several, `judge_all` adjusts for their number.

    Args:
        claim: See `Claim`.
        a: See `Claim`.
        b: See `Claim`.
        expect: See `Claim`.
        margin: See `Claim`.
        seed: Of the resampling.
        names: See `Claim`.
        unit: See `Claim`.
        at_least: See `Claim`.
        words: See `Claim`.

    Example:
        >>> right = np.arange(400) % 10 > 0
        >>> found = judge("They differ.", right, right, expect="differs", margin=0.03, names=("cls", "gap"))
        >>> found.verdict, found.estimate
        ('equivalent', 0.0)
    """
    return judge_all([Claim(claim, a, b, expect, margin, names, unit, at_least, words)], seed=seed)[0]


def judge_all(claims: Sequence[Claim], *, seed: int) -> list[Finding]:
    """Verdicts on the claims of one study; both kinds of p-values are adjusted over all of them.

    A claim of direction or difference is supported where the adjusted test rejects and the interval lies on
    its side of the null hypothesis, refuted where it lies on the other. Without such a difference, two
    one-sided tests within the margin make it equivalent. A claim of equality is equivalent where these tests
    succeed, whatever else, and refuted where an adjusted test rejects that the difference is within the
    margin, and the interval lies outside. Everything else cannot be told, and what would settle it is said.

    Args:
        claims: In the order of the answer.
        seed: Of the resampling.

    Returns:
        One finding a claim. ``p`` is of the null hypothesis of the claim, not adjusted; ``p_equivalence`` is
        adjusted, as ``p_holm`` is; ``ci95`` is not.

    Source:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    differences = [paired_difference(one.a, one.b, seed=seed) for one in claims]
    tests = [_p(one, found) for one, found in zip(claims, differences, strict=True)]
    sames = [equivalence_p(found, one.margin) for one, found in zip(claims, differences, strict=True)]
    # Of claims of equality it is not zero but the margin that a refutation has to leave behind.
    against = [
        _p_beyond(one, found) if one.expect == EQUAL else p
        for one, found, p in zip(claims, differences, tests, strict=True)
    ]
    return [
        _finding(one, found, ps, ALPHA / len(claims))
        for one, found, *ps in zip(
            claims, differences, tests, holm(tests), holm(sames), holm(against), strict=True
        )
    ]


def _p(claim: Claim, difference: Difference) -> float:
    if claim.null == 0:
        return difference.p
    return min(1.0, 2 * difference.tail(abs(difference.estimate - claim.null)))


def _p_beyond(claim: Claim, difference: Difference) -> float:
    """Two-sided p-value of a difference that is as large as the margin at most."""
    outside = abs(difference.estimate) - claim.margin
    return min(1.0, 2 * difference.tail(outside)) if outside > 0 else 1.0


def _finding(claim: Claim, difference: Difference, p: Sequence[float], alpha: float) -> Finding:
    different, same, against = (one <= ALPHA for one in p[1:])
    verdict = _verdict(claim, difference, against, same)
    missing = None
    if verdict == CANNOT_TELL:
        missing = needed(difference, claim.margin, null=_to_be_told_from(claim, difference), alpha=alpha)
    return Finding(
        claim=claim.claim,
        verdict=verdict,
        sentence=_sentence(claim, difference, verdict, different and same, missing),
        estimate=difference.estimate,
        ci95=difference.ci95,
        p=p[0],
        p_holm=p[1],
        p_equivalence=p[2],
        margin=claim.margin,
        smallest_detectable=smallest_detectable(difference),
        needed=missing,
        counts=_counts(claim, difference),
        null=claim.null,
        unit=claim.unit,
    )


def _verdict(claim: Claim, difference: Difference, rejected: bool, same: bool) -> str:
    low, high = difference.ci95
    if claim.expect == EQUAL:
        if same:
            return EQUIVALENT
        return REFUTED if rejected and (low > claim.margin or high < -claim.margin) else CANNOT_TELL
    above, below = rejected and low > claim.null, rejected and high < claim.null
    as_claimed = {DIFFERS: above or below, GREATER: above, LESS: below}[claim.expect]
    if as_claimed:
        return SUPPORTED
    if above or below:
        return REFUTED
    return EQUIVALENT if same else CANNOT_TELL


def _to_be_told_from(claim: Claim, difference: Difference) -> float | None:
    """What more data would tell the difference from; of two that are equal, nothing."""
    if claim.expect != EQUAL:
        return claim.null
    size = difference.estimate
    return math.copysign(claim.margin, size) if abs(size) > claim.margin else None


def _counts(claim: Claim, difference: Difference) -> dict[str, int]:
    counts = {"seeds": difference.seeds, "images": difference.images}
    if difference.alone is not None:
        counts |= {
            f"right only with {name}": n for name, n in zip(claim.names, difference.alone, strict=True)
        }
    return counts


def _sentence(
    claim: Claim, difference: Difference, verdict: str, small_but_there: bool, missing: str | None
) -> str:
    (a, b), (low, high), size = claim.names, difference.ci95, difference.estimate
    seeds = f"{difference.seeds} seed" + ("s" if difference.seeds > 1 else "")
    digits = 2 if min(high - low, claim.margin) < 0.005 else 1

    def number(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.{digits}f}" if in_points(claim.unit) else f"{value:{sign}.3g}"

    data = f"(95 % interval {number(low, '+')} to {number(high, '+')}; {seeds}, {difference.images:,} images)"
    margin = f"{number(claim.margin)} {claim.unit}"
    holds = difference.holds_for
    if verdict == EQUIVALENT:
        there = ", a small difference that is not chance," if small_but_there else ""
        return (
            f"{a} and {b} are the same within {margin} for {holds}: {b} minus {a} is "
            f"{number(size, '+')} {claim.unit}{there} {data}."
        )
    measured = f"{b} minus {a} is {number(size, '+')} {claim.unit} for {holds} {data}"
    if verdict == CANNOT_TELL:
        return f"{measured}, which does not settle it; needed: {missing}."
    if claim.null:
        side = "above" if size > claim.null else "below"
        return f"{measured}, {side} the {number(claim.null, '+')} that the claim is about."
    than = claim.words[0 if size > 0 else 1]
    small = f", less than the {margin} that matter," if small_but_there else ""
    return f"{b} is {than} than {a} by {number(abs(size))} {claim.unit}{small} for {holds} {data}."
