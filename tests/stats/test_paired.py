"""The statistics of a comparison keep what they promise: by hand, by enumeration, by simulation."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, binomtest, norm

from vit_cls.stats.intervals import holm
from vit_cls.stats.paired import difference_interval, mcnemar_mid_p, score_equivalence_p, score_interval
from vit_cls.stats.power import mcnemar_detectable_effect, mcnemar_required_images

REPEATS = int(os.environ.get("SIMULATION_REPEATS", 600))  # scripts/release_check.sh asks for more
SLACK = 1.5 * math.sqrt(0.05 * 0.95 / REPEATS)  # standard errors of a share of 5 % in so many repeats


def _chance(images: int, share_a: float, share_b: float, happens) -> float:
    """Probability of an event under a multinomial, by enumeration of the counts of who alone was right."""
    total = 0.0
    for discordant in range(images + 1):
        weight = binom.pmf(discordant, images, share_a + share_b)
        if weight < 1e-8:
            continue
        for only_b, p in enumerate(
            binom.pmf(np.arange(discordant + 1), discordant, share_b / (share_a + share_b))
        ):
            if weight * p > 1e-9 and happens(discordant - only_b, only_b):
                total += weight * p
    return total


def test_mcnemar_by_hand():
    # 12 images tell the models apart; (1 + 12 + 66) of 4096 ways give 2 or fewer to the one
    assert mcnemar_mid_p(10, 2) == pytest.approx((2 * 79 - 66) / 4096, abs=1e-15)
    assert mcnemar_mid_p(1, 0) == pytest.approx(0.5)
    assert mcnemar_mid_p(0, 0) == 1
    assert mcnemar_mid_p(7, 7) == 1


@pytest.mark.parametrize(("a", "b"), [(3, 11), (0, 5), (40, 61), (500, 600)])
def test_mcnemar_is_the_exact_test_less_half_of_what_was_seen(a, b):
    exact = binomtest(a, a + b, 0.5).pvalue
    assert mcnemar_mid_p(a, b) == pytest.approx(exact - binom.pmf(a, a + b, 0.5))
    assert mcnemar_mid_p(a, b) == mcnemar_mid_p(b, a)


@pytest.mark.parametrize("images", [30, 200, 1000])
@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.3])
def test_mcnemar_is_wrong_in_no_more_than_5_percent(images, discordance):
    half = discordance / 2
    assert _chance(images, half, half, lambda a, b: mcnemar_mid_p(a, b) <= 0.05) <= 0.055


@pytest.mark.parametrize(("images", "discordance", "margin"), [
    (300, 0.01, 0.01), (1000, 0.015, 0.01), (1000, 0.02, 0.01), (2000, 0.05, 0.01), (400, 0.1, 0.05),
    (150, 0.05, 0.05),
])  # fmt: skip
def test_equivalence_is_claimed_at_the_margin_in_no_more_than_5_percent(images, discordance, margin):
    shares = (discordance - margin) / 2, (discordance + margin) / 2
    chance = _chance(images, *shares, lambda a, b: score_equivalence_p(a, b, images, margin) <= 0.05)
    assert chance <= 0.055
    assert chance == pytest.approx(
        _chance(images, *reversed(shares), lambda a, b: score_equivalence_p(a, b, images, margin) <= 0.05)
    )


@pytest.mark.parametrize(("a", "b", "images"), [(0, 0, 300), (5, 9, 800), (20, 22, 5000), (3, 3, 100)])
def test_equivalence_is_the_90_percent_interval_inside_the_margin(a, b, images):
    low, high = score_interval(a, b, images, confidence=0.9)
    widest = max(-low, high)
    assert (
        score_equivalence_p(a, b, images, widest * 1.001)
        < 0.05
        < score_equivalence_p(a, b, images, widest * 0.999)
    )


def test_identical_predictions_are_equivalent_where_there_are_images_enough():
    # z**2 * (1 - margin) / margin = 267.8 images
    assert score_equivalence_p(0, 0, 267, 0.01) > 0.05 > score_equivalence_p(0, 0, 268, 0.01)
    none, images = np.zeros(3, int), np.array([100, 100, 100])
    low, high = difference_interval(none, none, images, seed=0)
    assert low == pytest.approx(-high)
    assert 0 < high < 0.02


def _reference_score(only_a, only_b, images, delta):
    """The score statistic with its variance from a numerical search for the likelihood's maximum."""

    def loss(share_a):
        shares = np.array([share_a, share_a + delta, 1 - 2 * share_a - delta])
        return -float(xlogy([only_a, only_b, images - only_a - only_b], shares).sum())

    low, high = max(0.0, -delta), (1 - delta) / 2
    share_a = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (only_b - only_a - images * delta) / math.sqrt(images * (2 * share_a + delta - delta**2))


@pytest.mark.parametrize(("a", "b", "images"), [(1, 0, 44), (3, 8, 100), (12, 2, 60), (20, 22, 500)])
def test_ends_of_the_score_interval_are_where_the_score_is_1_96(a, b, images):
    low, high = score_interval(a, b, images)
    assert _reference_score(a, b, images, low) == pytest.approx(1.95996, abs=1e-3)
    assert _reference_score(a, b, images, high) == pytest.approx(-1.95996, abs=1e-3)


def test_score_interval_where_it_has_a_closed_form():
    z2 = norm.ppf(0.975) ** 2
    assert score_interval(0, 0, 44) == pytest.approx((-z2 / (44 + z2), z2 / (44 + z2)), abs=1e-6)
    assert score_interval(0, 9, 9)[1] == 1
    assert score_interval(9, 0, 9)[0] == -1


def _draw(rng, images, share_a, share_b):
    """Counts by class of one simulated test set; images and shares by class."""
    counts = [rng.multinomial(n, [a, b, 1 - a - b]) for n, a, b in zip(images, share_a, share_b, strict=True)]
    return np.array(counts)[:, :2].T


@pytest.mark.parametrize(("classes", "per_class", "discordance", "difference"), [
    (10, 50, 0.06, 0.0), (10, 50, 0.15, 0.05), (50, 10, 0.2, 0.05), (100, 3, 0.3, 0.0), (10, 100, 0.02, 0.0),
    (10, 100, 0.05, 0.03), (10, 20, 0.1, 0.05), (4, 300, 0.03, 0.01),
    (10, 40, 0.03, 0.018), (10, 40, 0.05, 0.045),
])  # fmt: skip
def test_interval_of_the_difference_covers_in_93_to_97_percent(classes, per_class, discordance, difference):
    rng = np.random.default_rng(classes)
    images = np.full(classes, per_class)
    tilt = np.linspace(0.5, 1.5, classes)  # some classes are harder
    share_a, share_b = tilt * (discordance - difference) / 2, tilt * (discordance + difference) / 2
    covered = 0
    for repeat in range(REPEATS):
        only_a, only_b = _draw(rng, images, share_a, share_b)
        low, high = difference_interval(only_a, only_b, images, seed=repeat, resamples=400)
        covered += low <= difference <= high
    assert 0.93 - SLACK <= covered / REPEATS <= 0.97 + SLACK, covered / REPEATS


def test_interval_has_the_variance_of_a_stratified_sample_and_the_seed_decides():
    only_a, only_b, images = np.array([30, 0, 20, 1]), np.array([10, 25, 20, 0]), np.array([100, 200, 100, 1])
    share_a, share_b = only_a / images, only_b / images
    spread = (share_a + share_b - (share_b - share_a) ** 2) * images**2 / np.maximum(images - 1, 1)
    half = 1.96 * math.sqrt(spread[:3].sum()) / images.sum()
    low, high = difference_interval(only_a, only_b, images, seed=3, resamples=100_000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.02)
    assert (low, high) == difference_interval(only_a, only_b, images, seed=3, resamples=100_000)
    assert (low, high) != difference_interval(only_a, only_b, images, seed=4, resamples=100_000)


@pytest.mark.parametrize("counts", [([30, 9], [10, 5]), ([2, 0], [5, 0]), ([20, 10], [10, 20])])
def test_exchanging_the_models_mirrors_the_interval(counts):
    a, b = np.array(counts)
    low, high = difference_interval(a, b, np.array([100, 60]), seed=0)
    assert difference_interval(b, a, np.array([100, 60]), seed=0) == pytest.approx((-high, -low), abs=1e-9)


def test_classes_of_one_image_still_have_a_spread():
    only_a, only_b = np.r_[np.ones(40, int), np.zeros(160, int)], np.r_[np.zeros(170, int), np.ones(30, int)]
    low, high = difference_interval(only_a, only_b, np.ones(200, int), seed=0)
    assert low < -0.05 < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt((0.35 - 0.05**2) / 199), rel=0.05)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


@pytest.mark.parametrize(("images", "discordance"), [(540, 0.03), (2000, 0.2), (10_000, 0.15), (500, 0.1)])
def test_smallest_detectable_difference_is_found_in_80_percent(images, discordance):
    difference = mcnemar_detectable_effect(images, discordance)
    z = norm.ppf(0.975) * math.sqrt(discordance) + norm.ppf(0.8) * math.sqrt(discordance - difference**2)
    assert images == pytest.approx((z / difference) ** 2)
    rng = np.random.default_rng(0)
    rest = 1 - discordance
    shares = [(discordance - difference) / 2, (discordance + difference) / 2, rest]
    found = np.mean(
        [mcnemar_mid_p(a, b) <= 0.05 for a, b, _ in rng.multinomial(images, shares, size=REPEATS)]
    )
    assert found == pytest.approx(0.8, abs=0.05)  # the test is discrete


def test_smallest_detectable_never_exceeds_what_can_disagree():
    assert mcnemar_detectable_effect(540, 0.03) == pytest.approx(0.021, abs=5e-4)
    assert mcnemar_detectable_effect(3, 0.5) == 1
    d = mcnemar_detectable_effect(1000, 0.0)  # all on one side: n * d = (z1 + z2 * sqrt(1 - d)) ** 2
    assert 1000 * d == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8) * math.sqrt(1 - d)) ** 2)
    values = [mcnemar_detectable_effect(n, 0.02) for n in range(1, 2000)]
    assert all(0 < v <= 1 for v in values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


def test_images_needed_settle_it_in_80_percent():
    rng = np.random.default_rng(0)
    n = mcnemar_required_images(10, 20, 400, 0.001)  # a difference of 2.5 points among 7.5 that disagree
    draws = rng.multinomial(n, [10 / 400, 20 / 400, 370 / 400], size=REPEATS)
    assert np.mean([mcnemar_mid_p(a, b) <= 0.05 for a, b, _ in draws]) == pytest.approx(0.8, abs=0.035)
    n = mcnemar_required_images(6, 6, 400, 0.01)  # no difference among 3 points that disagree
    draws = rng.multinomial(n, [6 / 400, 6 / 400, 388 / 400], size=REPEATS)
    assert np.mean([score_equivalence_p(a, b, n, 0.01) <= 0.05 for a, b, _ in draws]) == pytest.approx(
        0.8, abs=0.035
    )
    assert mcnemar_required_images(0, 0, 50, 0.01) == 268
    assert mcnemar_required_images(20, 10, 400, 0.01) == mcnemar_required_images(10, 20, 400, 0.01)
