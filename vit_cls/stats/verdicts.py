"""Claims stated before measuring, and the verdicts on them, adjusted for how many there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError
from vit_cls.stats.intervals import ALPHA, holm
from vit_cls.stats.power import minimum_detectable_effect, required_sample_size
from vit_cls.stats.random_effects import Difference, equivalence_p, paired_difference

SUPPORTED, REFUTED, EQUIVALENT, CANNOT_TELL = "supported", "refuted", "equivalent", "cannot tell"
VERDICTS = (SUPPORTED, REFUTED, EQUIVALENT, CANNOT_TELL)
POINTS = "points"
"""Unit of accuracies and other shares; also the first word of units such as ``points per doubling``."""
DIFFERS, GREATER, LESS, EQUAL = "differs", "greater", "less", "equal"
EXPECTATIONS = (DIFFERS, GREATER, LESS, EQUAL)


def in_points(unit: str) -> bool:
    """Whether numbers of a unit are shares, which people read as percentage points: 100 times as large."""
    return unit.partition(" ")[0] == POINTS


@dataclass(frozen=True)
class Finding:
    """One claim, stated before measuring, and what may be said of it.

    Args:
        claim: As a sentence that could be wrong.
        verdict: One of `VERDICTS`.
        sentence: The verdict with the numbers that it rests on, as one sentence.
        estimate: The difference (or other quantity) that was estimated; of ``points``, as a share.
        p: p-value of a difference of ``null``; None where there is no test.
        p_holm: The same, adjusted over the claims that were judged together.
        p_equivalence: p-value of a difference as large as the margin, adjusted likewise.
        margin: The largest difference that does not matter, stated before.
        smallest_detectable: The smallest difference that this much data finds with a power of 80 %.
        needed: What would settle it, in words, where the verdict is `CANNOT_TELL`.
        counts: Seeds, images and other counts, by name.
        null: The difference that the claim was tested against; 0 is no difference.
        unit: What the numbers count, as it is written behind them; see `in_points`.
    """

    claim: str
    verdict: str
    sentence: str
    estimate: float | None = None
    ci95: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    p_equivalence: float | None = None
    margin: float | None = None
    smallest_detectable: float | None = None
    needed: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    null: float = 0.0
    unit: str = POINTS

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict


@dataclass(frozen=True)
class Claim:
    """What is claimed of two methods on the same images, before it is measured.

    Args:
        claim: As a sentence that could be wrong.
        a: Scores of A, shape ``(seeds, images)`` or ``(images,)``; bool (right or not) or float.
        b: Scores of B, of the same seeds and images.
        expect: One of `EXPECTATIONS`; ``greater`` means B above A.
        margin: The largest difference that does not matter, above 0, in the unit of the scores.
        unit: ``points``, or a unit that begins with it, writes shares as percentage points.
        at_least: For ``greater`` and ``less``: the size that the claim gives the difference; it moves the
            null hypothesis. Below 0 it claims "no worse than".
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
        check_choice("expect", self.expect, EXPECTATIONS)
        if self.at_least and self.expect not in (GREATER, LESS):
            raise ConfigError(
                f"at_least={self.at_least} goes with expect='greater' or 'less'; got {self.expect!r}. "
                "Leave it out: what is too small to matter is the margin."
            )

    @property
    def null(self) -> float:
        """The difference that the claim is tested against."""
        return -self.at_least if self.at_least and self.expect == LESS else self.at_least


def judge_all(claims: Sequence[Claim], *, seed: int) -> list[Finding]:
    """Verdicts on the claims of one study; both kinds of p-values are adjusted over all of them.

    A claim of direction or difference is supported where the adjusted test rejects and the interval lies on
    its side of the null hypothesis, refuted where it lies on the other. Without such a difference, two
    one-sided tests within the margin make it equivalent. A claim of equality is equivalent where these tests
    succeed, whatever else, and refuted where an adjusted test rejects that the difference is within the
    margin, and the interval lies outside. Everything else cannot be told, and what would settle it is said.

    Args:
        seed: Of the resampling.

    Returns:
        One finding a claim. ``p`` is of the null hypothesis of the claim, not adjusted, nor is ``ci95``.

    Example:
        >>> right = np.arange(400) % 10 > 0
        >>> [finding] = judge_all([Claim("They differ.", right, right, margin=0.03)], seed=0)
        >>> finding.verdict, finding.estimate
        ('equivalent', 0.0)

    Source:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    differences = [paired_difference(claim.a, claim.b, seed=seed) for claim in claims]
    pairs = list(zip(claims, differences, strict=True))
    different = [_p(*pair) for pair in pairs]
    equivalent = [equivalence_p(difference, claim.margin) for claim, difference in pairs]
    # Of claims of equality it is not zero but the margin that a refutation has to leave behind.
    refuting = [
        _p_beyond(*pair) if pair[0].expect == EQUAL else p for pair, p in zip(pairs, different, strict=True)
    ]
    p_values = zip(different, holm(different), holm(equivalent), holm(refuting), strict=True)
    return [_finding(*pair, p, ALPHA / len(claims)) for pair, p in zip(pairs, p_values, strict=True)]


def _p(claim: Claim, difference: Difference) -> float:
    if claim.null == 0:
        return difference.p
    return min(1.0, 2 * difference.tail(abs(difference.estimate - claim.null)))


def _p_beyond(claim: Claim, difference: Difference) -> float:
    """Two-sided p-value of a difference that is as large as the margin at most."""
    outside = abs(difference.estimate) - claim.margin
    return min(1.0, 2 * difference.tail(outside)) if outside > 0 else 1.0


def _finding(claim: Claim, difference: Difference, p: Sequence[float], alpha: float) -> Finding:
    different, same, against = (adjusted <= ALPHA for adjusted in p[1:])
    verdict = _verdict(claim, difference, against, same)
    missing = None
    if verdict == CANNOT_TELL:
        null = _to_be_told_from(claim, difference)
        missing = required_sample_size(difference, claim.margin, null=null, alpha=alpha)
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
        smallest_detectable=minimum_detectable_effect(difference),
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
    if difference.discordant is not None:
        counts |= {
            f"right only with {name}": n for name, n in zip(claim.names, difference.discordant, strict=True)
        }
    return counts


def _sentence(
    claim: Claim, difference: Difference, verdict: str, small_but_there: bool, missing: str | None
) -> str:
    (a, b), (low, high), size = claim.names, difference.ci95, difference.estimate
    seeds = f"{difference.seeds} seed" + ("s" if difference.seeds > 1 else "")
    digits = 2 if min(high - low, claim.margin) < 0.005 else 1

    def number(value: float, sign: bool = False) -> str:
        if in_points(claim.unit):
            return fmt.percent(value, digits, unit="", signed=sign)
        return fmt.significant(value, 3, signed=sign)

    def signed(value: float) -> str:
        return number(value, sign=True)

    bounds = fmt.interval(difference.ci95, signed)
    data = f"({bounds}; {seeds}, {fmt.count(difference.images)} images)"
    margin = f"{number(claim.margin)} {claim.unit}"
    holds = difference.holds_for
    if verdict == EQUIVALENT:
        there = ", a small difference that is not chance," if small_but_there else ""
        return (
            f"{a} and {b} are the same within {margin} for {holds}: {b} minus {a} is "
            f"{signed(size)} {claim.unit}{there} {data}."
        )
    measured = f"{b} minus {a} is {signed(size)} {claim.unit} for {holds} {data}"
    if verdict == CANNOT_TELL:
        return f"{measured}, which does not settle it; needed: {missing}."
    if claim.null:
        side = "above" if size > claim.null else "below"
        return f"{measured}, {side} the {signed(claim.null)} that the claim is about."
    than = claim.words[0 if size > 0 else 1]
    small = f", less than the {margin} that matter," if small_but_there else ""
    return f"{b} is {than} than {a} by {number(abs(size))} {claim.unit}{small} for {holds} {data}."
