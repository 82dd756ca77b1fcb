"""Statistics over seeds and images keep what they promise: by hand, by property, by simulation."""

from __future__ import annotations

import math
import os
import re

import numpy as np
import pytest
from scipy.stats import t

from vit_cls.errors import ConfigError, DataError
from vit_cls.stats import paired, power
from vit_cls.stats.intervals import permutation_p, wilson_interval
from vit_cls.stats.power import minimum_detectable_effect, required_sample_size
from vit_cls.stats.random_effects import equivalence_p, mean_interval, paired_difference

REPEATS = int(os.environ.get("SIMULATION_REPEATS", 300))  # scripts/release_check.sh asks for more
SLACK = 3 * math.sqrt(0.05 * 0.95 / REPEATS)  # three standard errors of a share of 5 % in so many repeats


def _scores(rng, seeds, images, *, discordance, difference=0.0, seed_sd=0.0, same=0.5):
    """Right or wrong of two ways, of known mean difference.

    The difference of each seed is drawn around the mean; a share ``same`` of the images behaves alike under
    all seeds, the others anew under each.
    """
    means = difference + seed_sd * rng.standard_normal((seeds, 1))
    discordance = np.maximum(discordance, abs(means) + 0.005)
    u = np.where(rng.random(images) < same, rng.random(images), rng.random((seeds, images)))
    only_b, only_a = u < (discordance + means) / 2, u > 1 - (discordance - means) / 2
    both = rng.random((seeds, images)) < 0.9
    return (only_a | both) & ~only_b, only_b | (both & ~only_a)


def _share(happens, *, repeats=REPEATS, seed=0, **how):
    rng = np.random.default_rng(seed)
    return sum(happens(*_scores(rng, **how)) for _ in range(repeats)) / repeats


def _reference_anova_error(values):
    """Squared standard error from the mean squares of a two-way table, cell by cell."""
    seeds, images = values.shape
    grand = sum(values.ravel()) / values.size
    rows = [sum(row) / images for row in values]
    columns = [sum(column) / seeds for column in values.T]
    of_rows = images * sum((one - grand) ** 2 for one in rows) / (seeds - 1)
    of_columns = seeds * sum((one - grand) ** 2 for one in columns) / (images - 1)
    rest = sum(
        (values[s, i] - rows[s] - columns[i] + grand) ** 2 for s in range(seeds) for i in range(images)
    ) / ((seeds - 1) * (images - 1))
    typical = sum((one - grand) ** 4 for one in columns) / sum((one - grand) ** 2 for one in columns)
    parts = of_rows / values.size, max(0.0, (of_columns - rest) / values.size + typical / images**2)
    return parts, rest / values.size


# --- by hand and by property


def test_standard_error_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 30)) + rng.normal(size=(2, 4, 1)) + rng.normal(size=(2, 1, 30))
    found = paired_difference(a, b)
    (of_seeds, of_images), rest = _reference_anova_error(b - a)
    assert found.variance.seeds == pytest.approx(of_seeds)
    assert found.variance.images == pytest.approx(of_images)
    assert found.variance.residual == pytest.approx(rest)
    assert found.standard_error == pytest.approx(math.sqrt(of_seeds + of_images))
    share = of_seeds / (of_seeds + of_images)
    factor = share * t.ppf(0.975, 3) + (1 - share) * t.ppf(0.975, 29)
    half = factor * found.standard_error
    assert found.ci95 == pytest.approx((found.estimate - half, found.estimate + half))
    assert found.seed_sd == pytest.approx(np.std((b - a).mean(axis=1), ddof=1))


def test_one_seed_of_numbers_is_the_paired_t_test_with_one_more_image():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 50))
    found = paired_difference(a, b)
    d = (b - a) - (b - a).mean()
    error = math.sqrt(d.var(ddof=1) / 50 + (d**4).sum() / (d**2).sum() / 50**2)
    assert found.standard_error == pytest.approx(error)
    assert found.p == pytest.approx(2 * t.sf(abs(found.estimate) / error, 49))
    assert (found.seeds, found.seed_sd, found.holds_for) == (1, None, "this one training")


def test_one_seed_of_right_or_wrong_is_the_comparison_of_two_models():
    a, b = _scores(np.random.default_rng(2), 1, 400, discordance=0.1, difference=0.03)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    found = paired_difference(a, b, seed=3)
    assert found.discordant == (only_a, only_b)
    assert found.p == paired.mcnemar_mid_p(only_a, only_b)
    counts = np.array([only_a]), np.array([only_b]), np.array([400])
    assert found.ci95 == paired.difference_interval(*counts, seed=3)
    assert equivalence_p(found, 0.05) == paired.score_equivalence_p(only_a, only_b, 400, 0.05)
    assert minimum_detectable_effect(found) == power.mcnemar_detectable_effect(400, (only_a + only_b) / 400)
    assert f"{power.mcnemar_required_images(only_a, only_b, 400, 0.01):,}"[0] in required_sample_size(
        found, 0.01
    )


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_exchanging_the_ways_mirrors_everything(seeds):
    a, b = _scores(np.random.default_rng(4), seeds, 200, discordance=0.15, difference=0.05, seed_sd=0.02)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert other.estimate == pytest.approx(-one.estimate)
    assert other.ci95 == pytest.approx((-one.ci95[1], -one.ci95[0]))
    assert other.p == pytest.approx(one.p)
    assert equivalence_p(other, 0.08) == pytest.approx(equivalence_p(one, 0.08))


def test_order_of_seeds_and_of_images_does_not_matter_but_pairs_do():
    rng = np.random.default_rng(5)
    a, b = _scores(rng, 4, 150, discordance=0.1, seed_sd=0.02)
    found = paired_difference(a, b)
    rows, columns = rng.permutation(4), rng.permutation(150)
    again = paired_difference(a[rows][:, columns], b[rows][:, columns])
    assert again.standard_error == pytest.approx(found.standard_error)
    hard = rng.random(150)
    a, b = hard + 0.1 * rng.random((2, 4, 150))
    apart = paired_difference(a, b[:, columns])
    assert apart.standard_error > 3 * paired_difference(a, b).standard_error


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_p_is_at_most_5_percent_where_zero_is_outside_the_interval(seeds):
    rng = np.random.default_rng(6)
    agreed = []
    for _ in range(150):
        a, b = _scores(rng, seeds, 120, discordance=0.2, difference=rng.uniform(-0.1, 0.1), seed_sd=0.02)
        found = paired_difference(a, b)
        outside = found.ci95[0] > 0 or found.ci95[1] < 0
        assert (found.p <= 0.05) == outside
        agreed.append(outside)
    assert 10 < sum(agreed) < 140


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    a, b = _scores(np.random.default_rng(7), 3, 500, discordance=0.1, seed_sd=0.003)
    found = paired_difference(a, b)
    edge = abs(found.estimate) + found.quantile(0.95) * found.standard_error
    assert equivalence_p(found, edge) == pytest.approx(0.05, abs=1e-6)
    assert equivalence_p(found, 1.01 * edge) < 0.05 < equivalence_p(found, 0.99 * edge)


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_predictions_are_equal_but_for_what_so_few_images_cannot_show(seeds):
    right = np.tile(np.arange(540) % 9 > 0, (seeds, 1))
    found = paired_difference(right, right)
    low, high = paired.score_interval(0, 0, 540)
    assert (found.estimate, found.p) == (0, 1)
    assert found.ci95 == pytest.approx((low, high), rel=0.02)
    assert found.standard_error > 0
    assert equivalence_p(found, 0.01) < 0.05 < equivalence_p(found, 0.003)
    few = paired_difference(right[:, :50], right[:, :50])
    assert equivalence_p(few, 0.01) > 0.05


def test_the_interval_does_not_narrow_with_the_first_image_that_differs():
    right = np.ones((3, 540), dtype=bool)
    widths = []
    for count in range(4):
        wrong = right.copy()
        wrong[0, :count] = False
        low, high = paired_difference(right, wrong).ci95
        widths.append(high - low)
    assert widths[0] == pytest.approx(min(widths), rel=0.01)
    assert max(widths) < 1.4 * widths[0]


def test_scores_that_never_vary_raise_no_warning():
    same = np.full((3, 20), 0.5)
    found = paired_difference(same, same)
    assert (found.estimate, found.ci95, found.p, found.standard_error) == (0, (0, 0), 1, 0)
    assert equivalence_p(found, 0.01) == 0
    assert minimum_detectable_effect(found) == 0
    assert paired_difference(same, same + 0.25).p < 1e-6
    assert "neither" not in required_sample_size(found, 0.01)


def test_mean_of_one_seed_is_wilsons_and_of_several_stays_in_range():
    right = np.arange(540) % 12 > 0
    assert mean_interval(right).ci95 == wilson_interval(int(right.sum()), 540)
    perfect = mean_interval(np.ones((3, 540), dtype=bool))
    assert perfect.estimate == perfect.ci95[1] == 1
    assert perfect.ci95[0] == pytest.approx(wilson_interval(540, 540)[0], abs=5e-4)
    values = np.random.default_rng(8).random((3, 40))
    assert mean_interval(values).ci95 == paired_difference(np.zeros((3, 40)), values).ci95


def test_permutation_p_counts_the_data_as_one_permutation():
    assert permutation_p(5.0, np.arange(5.0)) == 1 / 6
    assert permutation_p(4.0, np.arange(5.0)) == 2 / 6  # ties count
    assert permutation_p(-1.0, np.arange(5.0)) == 1
    with pytest.raises(DataError, match=r"at least one draw; got 1\.0 observed and 0 draws"):
        permutation_p(1.0, np.array([]))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((2, 5), bool), np.ones((3, 5), bool), r"shapes \(2, 5\) and \(3, 5\)"),
        (np.ones((2, 5), bool), np.ones((2, 5)), "bool and float64"),
        (np.ones((2, 1)), np.ones((2, 1)), "at least two images"),
        (np.ones((2, 2)), np.array([[1, np.nan], [1, 1]]), "1 of 4 scores are not"),
    ],
)
def test_scores_that_cannot_be_paired_are_refused(a, b, message):
    with pytest.raises(DataError, match=message):
        paired_difference(a, b)


def test_margin_is_checked():
    right = np.ones((2, 5), bool)
    for margin in (0, -0.01, math.nan):
        with pytest.raises(ConfigError, match=r"margin must be above 0.*got"):
            equivalence_p(paired_difference(right, right), margin)


# --- by simulation


@pytest.mark.parametrize(
    ("seeds", "images", "discordance", "seed_sd", "same", "difference"),
    [
        (1, 100, 0.15, 0, 1, 0.02), (1, 540, 0.03, 0, 1, 0), (1, 540, 0.08, 0, 1, 0.02),
        (3, 540, 0.03, 0, 0, 0.02), (3, 540, 0.08, 0, 1, 0), (3, 540, 0.15, 0.003, 0, 0),
        (3, 540, 0.03, 0.01, 1, 0.02), (3, 540, 0.08, 0.01, 0, 0), (3, 100, 0.15, 0.02, 0.5, 0.02),
        (3, 540, 0.15, 0.02, 0.5, 0), (5, 540, 0.03, 0, 0.5, 0), (5, 100, 0.08, 0.003, 0, 0.02),
        (5, 540, 0.15, 0.01, 0.5, 0.02), (5, 540, 0.03, 0.02, 0, 0), (5, 100, 0.15, 0, 1, 0),
    ],
)  # fmt: skip
def test_the_interval_covers_95_of_100_times(seeds, images, discordance, seed_sd, same, difference):
    def covers(a, b):
        low, high = paired_difference(a, b, resamples=500).ci95
        return low - 1e-12 <= difference <= high + 1e-12

    share = _share(covers, seeds=seeds, images=images, discordance=discordance, seed_sd=seed_sd, same=same,
                   difference=difference)  # fmt: skip
    # 93 to 97 %, and two standard errors of what chance adds in so many repeats
    assert 0.93 - 2 / 3 * SLACK <= share <= 0.97 + 2 / 3 * SLACK


def test_where_hardly_an_image_differs_the_interval_is_wide_rather_than_narrow():
    def covers(a, b):
        low, high = paired_difference(a, b).ci95
        return low <= 0.02 <= high

    how = {"images": 100, "discordance": 0.03, "difference": 0.02}
    assert all(_share(covers, seeds=s, same=same, **how) >= 0.94 for s in (3, 5) for same in (0, 0.5, 1))


@pytest.mark.parametrize(("discordance", "seed_sd"), [(0.03, 0), (0.06, 0.003), (0.1, 0.01)])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_a_difference_of_the_margin_is_called_equivalent_in_no_more_than_5_of_100(
    seeds, discordance, seed_sd
):
    share = _share(
        lambda a, b: equivalence_p(paired_difference(a, b, resamples=10), 0.01) <= 0.05, seed=2, seeds=seeds,
        images=800, discordance=discordance, difference=0.01, seed_sd=seed_sd if seeds > 1 else 0,
    )  # fmt: skip
    assert share <= 0.055 + 2 / 3 * SLACK


def test_the_difference_said_to_be_detectable_is_detected_in_80_of_100():
    how = {"seeds": 5, "images": 540, "discordance": 0.1, "seed_sd": 0.005, "same": 0.3}
    rng = np.random.default_rng(11)
    sizes = [minimum_detectable_effect(paired_difference(*_scores(rng, **how))) for _ in range(100)]
    found = _share(lambda a, b: paired_difference(a, b).p <= 0.05, repeats=400,
                   difference=float(np.mean(sizes)), **how)  # fmt: skip
    assert 0.7 < found < 0.93


def test_needed_says_which_of_seeds_and_images_would_help():
    rng = np.random.default_rng(13)
    noisy = paired_difference(*_scores(rng, 3, 4000, discordance=0.05, difference=0.01, seed_sd=0.03))
    assert "no number of images alone with these 3 seeds" in required_sample_size(noisy, 0.01)
    fixed = paired_difference(
        *(np.tile(one, (3, 1)) for one in _scores(rng, 1, 300, discordance=0.1, same=1))
    )
    assert "no number of seeds alone with these 300 images" in required_sample_size(fixed, 0.01)
    fresh = paired_difference(*_scores(rng, 3, 300, discordance=0.1, same=0))
    said = required_sample_size(fresh, 0.04)
    assert re.fullmatch(r"about \d+ seeds with these 300 images, or [\d,]+ images with these 3 seeds", said)
    # what is on the hypothesis cannot be told from it
    assert required_sample_size(fresh, 0.004, null=fresh.estimate).startswith(
        "more seeds and more images together"
    )


def test_needed_images_are_enough():
    rng = np.random.default_rng(14)
    how = {"seeds": 5, "discordance": 0.1, "same": 1, "difference": 0.0}
    said = required_sample_size(paired_difference(*_scores(rng, images=3000, **how)), 0.01, null=None)
    images = int(said.split()[1].replace(",", ""))
    assert 4000 < images < 30_000
    settled = _share(lambda a, b: equivalence_p(paired_difference(a, b), 0.01) <= 0.05, repeats=60,
                     images=images, **how)  # fmt: skip
    assert settled > 0.6
