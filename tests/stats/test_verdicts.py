"""Verdicts follow from the claim, the interval and the margin, and keep their level over many claims."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vit_cls.errors import ConfigError
from vit_cls.stats.verdicts import CANNOT_TELL, EQUIVALENT, REFUTED, SUPPORTED, Claim, judge_all


def _judge(claim, a, b, **options):
    return judge_all([Claim(claim, a, b, **options)], seed=0)[0]


def _pair(difference, *, seeds=3, images=2000, both=0.5, sd=0.0):
    """Two ways, B better by ``difference`` of the images under each seed, ``both`` points against it."""
    a, b = np.ones((seeds, images), dtype=bool), np.ones((seeds, images), dtype=bool)
    for s in range(seeds):
        size = round((difference + sd * (s - (seeds - 1) / 2)) * images)
        shift, noise = 11 * s, round(both / 100 * images)
        gains, losses = (size + noise, noise) if size > 0 else (noise, noise - size)
        a[s, shift : shift + gains] = False
        b[s, images - shift - losses : images - shift] = False
    return a, b


@pytest.mark.parametrize(
    ("difference", "expect", "at_least", "verdict"),
    [
        (0.03, "greater", 0, SUPPORTED), (-0.03, "greater", 0, REFUTED), (0.0, "greater", 0, EQUIVALENT),
        (0.03, "less", 0, REFUTED), (-0.03, "less", 0, SUPPORTED), (0.0, "less", 0, EQUIVALENT),
        (0.03, "differs", 0, SUPPORTED), (-0.03, "differs", 0, SUPPORTED), (0.0, "differs", 0, EQUIVALENT),
        (0.03, "equal", 0, REFUTED), (-0.03, "equal", 0, REFUTED), (0.0, "equal", 0, EQUIVALENT),
        (0.10, "greater", 0.06, SUPPORTED), (0.03, "greater", 0.06, REFUTED),
        (0.06, "greater", 0.06, CANNOT_TELL),
        (-0.10, "less", 0.06, SUPPORTED), (-0.03, "less", 0.06, REFUTED), (0.03, "less", 0.06, REFUTED),
        (0.0, "greater", -0.01, SUPPORTED), (-0.03, "greater", -0.01, REFUTED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seeds", [1, 3])
def test_verdicts_follow_the_claim(seeds, difference, expect, at_least, verdict):
    found = _judge("c", *_pair(difference, seeds=seeds), expect=expect, margin=0.01, at_least=at_least)
    assert found.verdict == verdict, found.sentence
    assert (found.needed is not None) == (verdict == CANNOT_TELL)
    assert found.margin == 0.01
    # the difference that it was tested against; no zero with a minus
    assert str(found.null) == str(-at_least if at_least and expect == "less" else at_least)
    assert found.smallest_detectable > 0
    assert (found.counts["seeds"], found.counts["images"]) == (seeds, 2000)


@pytest.mark.parametrize("expect", ["greater", "less", "differs", "equal"])
def test_little_data_cannot_tell_and_says_what_is_needed(expect):
    found = _judge("c", *_pair(0.0, images=200, both=5), expect=expect, margin=0.01)
    assert found.verdict == CANNOT_TELL
    assert "images" in found.needed
    assert found.needed in found.sentence


def test_a_significant_difference_within_the_margin_is_named():
    a, b = _pair(0.006, images=5000, both=0.1)
    equal = _judge("c", a, b, expect="equal", margin=0.02)
    assert equal.verdict == EQUIVALENT
    assert "a small difference that is not chance" in equal.sentence
    greater = _judge("c", a, b, expect="greater", margin=0.02)
    assert greater.verdict == SUPPORTED
    assert "less than the 2.00 points that matter" in greater.sentence


def test_sentences_say_who_by_how_much_and_for_what():
    a, b = _pair(0.03)
    found = _judge("c", a, b, expect="greater", margin=0.01, names=("CLS", "GAP"))
    low, high = (100 * bound for bound in found.ci95)
    assert found.sentence == (
        "GAP is better than CLS by 3.0 points for training with this recipe "
        f"(95 % interval {low:+.1f} to {high:+.1f}; 3 seeds, 2,000 images)."
    )
    one = _judge("c", a[:1], b[:1], expect="less", margin=0.01, names=("CLS", "GAP"))
    assert one.sentence.startswith("GAP is better than CLS by 3.0 points for this one training (")
    assert "; 1 seed, 2,000 images)" in one.sentence
    assert one.counts["right only with GAP"] == 70
    plain = _judge("c", a * 1.0, b * 1.0, expect="greater", margin=0.01, unit="of R2")
    assert "by 0.03 of R2 for" in plain.sentence
    assert (plain.unit, found.unit) == ("of R2", "points")


def test_a_claim_brings_words_and_unit_of_its_own():
    a, b = _pair(0.03)
    options = {
        "margin": 0.004,
        "names": ("X", "Y"),
        "unit": "points per doubling",
        "words": ("higher", "lower"),
    }
    up, down = (_judge("c", *pair, expect="greater", **options) for pair in ((a, b), (b, a)))
    assert up.sentence.startswith("Y is higher than X by 3.00 points per doubling for ")
    assert down.sentence.startswith("Y is lower than X by 3.00 points per doubling for ")
    assert up.unit == "points per doubling"
    assert up.estimate == pytest.approx(0.03)  # a share, as of any points


def test_holm_makes_claims_harder_together():
    a, b = _pair(0.01, images=600, sd=0.003)
    alone = _judge("c", a, b, expect="differs", margin=0.01)
    nothing = Claim("n", a, a)
    together = judge_all([Claim("c", a, b), nothing, nothing], seed=0)
    assert alone.p == together[0].p == alone.p_holm
    assert together[0].p_holm == pytest.approx(3 * alone.p)
    assert together[1].p_equivalence == pytest.approx(
        3 * _judge("n", a, a, expect="equal", margin=0.01).p_equivalence
    )
    assert judge_all([], seed=0) == []


def test_margin_and_expectation_are_checked():
    right = np.ones((2, 5), bool)
    with pytest.raises(ConfigError, match=r"margin must be above 0.*got 0"):
        _judge("x", right, right, expect="equal", margin=0)
    with pytest.raises(ConfigError, match=r"got 'graeter'\. Did you mean `greater`"):
        _judge("x", right, right, expect="graeter", margin=0.1)
    with pytest.raises(ConfigError, match=r"at_least=0\.1 goes with"):
        _judge("x", right, right, expect="equal", margin=0.1, at_least=0.1)


def test_among_equal_heads_a_winner_is_found_in_no_more_than_5_of_100_studies():
    rng = np.random.default_rng(10)
    winners, studies = 0, 100
    for _ in range(studies):
        chance = rng.beta(9, 1, size=300)  # how often each image is right, the same for all heads
        heads = rng.random((4, 3, 300)) < np.clip(chance + 0.01 * rng.standard_normal((4, 3, 1)), 0, 1)
        claims = [Claim("differ", a, b) for a, b in itertools.combinations(heads, 2)]
        winners += any(one.verdict == SUPPORTED for one in judge_all(claims, seed=0))
    assert winners / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


def test_a_difference_as_large_as_the_margin_refutes_equality_in_no_more_than_5_of_100_studies():
    rng = np.random.default_rng(12)
    refuted, studies, margin, discordance = 0, 30, 0.01, 0.04
    for _ in range(studies):
        claims = []
        for _ in range(8):
            u, both = rng.random((2, 1, 600))
            only_a, only_b = u > 1 - (discordance - margin) / 2, u < (discordance + margin) / 2
            a, b = (only_a | (both < 0.9)) & ~only_b, only_b | ((both < 0.9) & ~only_a)
            claims.append(Claim("the same", a, b, expect="equal", margin=margin))
        refuted += any(one.verdict == REFUTED for one in judge_all(claims, seed=0))
    assert refuted / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
