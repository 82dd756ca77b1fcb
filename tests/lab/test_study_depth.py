"""Study depth: what each step adds, and whether the class token gains more; on answers that were made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vit_cls.errors import ConfigError
from vit_cls.lab.studies.depth import DepthStudy, depth_slopes
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Answers, Setup
from vit_cls.stats.verdicts import CANNOT_TELL, EQUIVALENT, REFUTED, SUPPORTED

TESTED = 599


@pytest.fixture
def setup(tmp_path):
    return Setup("digits", tmp_path / "study", seeds=3)


def _right(share):
    """So many images in each seed, not quite the same ones."""
    return [np.roll(np.arange(TESTED) < round(share * TESTED), seed) for seed in range(3)]


def _analyse(told, study, shares):
    for head, by_depth in study.arms().items():
        for depth, trials in by_depth.items():
            told(study.setup.folder, trials, _right(shares[head][depth]))
    return study.analyse(Answers(study.setup.folder))


def test_gains_and_the_difference_of_gains_are_found(setup, told):
    study = DepthStudy(setup, depths=[1, 2, 4])
    shares = {"cls": {1: 0.5, 2: 0.7, 4: 0.9}, "gap": {1: 0.7, 2: 0.8, 4: 0.8}}
    result = _analyse(told, study, shares)
    found = {one.claim: one for one in result.findings}
    verdicts = {claim: one.verdict for claim, one in found.items()}
    assert verdicts == {
        "cls gains more from depth than gap.": SUPPORTED,
        "With cls, depth 2 beats depth 1.": SUPPORTED,
        "With cls, depth 4 beats depth 2.": SUPPORTED,
        "With gap, depth 2 beats depth 1.": SUPPORTED,
        "With gap, depth 4 beats depth 2.": EQUIVALENT,
    }
    contrast = found["cls gains more from depth than gap."]
    assert contrast.estimate == pytest.approx(0.2 - 0.05, abs=0.002)  # points by doubling the depth
    assert found["With cls, depth 4 beats depth 2."].estimate == pytest.approx(0.2, abs=0.002)
    assert result.headline.startswith(
        "Supported: the slope of cls is higher than the slope of gap by 14.9 points per doubling "
    )
    assert "Best on validation: cls with depth 4, with 90.0 % of the test images right." in result.headline
    assert all(one.p_holm >= one.p for one in result.findings)


def test_slopes_are_the_same_where_they_add_up_to_no_more_than_the_margin_over_all_doublings(setup, told):
    """One seed of 599 images tells the slopes apart by about 4 points per doubling, 8 from depth 1 to 4."""
    rng = np.random.default_rng(0)
    verdicts = {}
    rows = {
        (head, depth): rng.permutation(TESTED) < TESTED // 2 for head in ("cls", "gap") for depth in (1, 4)
    }
    for margin in (0.05, 0.1):
        one = replace(setup, margin=margin, seeds=1, folder=setup.folder / str(margin))
        study = DepthStudy(one, depths=[1, 4])
        for head, by_depth in study.arms().items():
            for depth, trials in by_depth.items():
                told(one.folder, trials, [rows[head, depth]])
        found = study.analyse(Answers(one.folder)).findings[0]
        assert (found.margin, found.unit) == (margin / 2, "points per doubling")
        assert abs(found.estimate) < 0.01
        verdicts[margin] = found.verdict
        if found.verdict == EQUIVALENT:
            assert max(abs(bound) for bound in found.ci95) * 2 < margin  # accuracies at depth 4
            assert f"are the same within {100 * margin / 2:.1f} points per doubling" in found.sentence
    assert verdicts == {0.05: CANNOT_TELL, 0.1: EQUIVALENT}


class Chosen(Answers):
    """Answers whose validation images prefer another arm than the test images do."""

    def val_accuracy(self, trials):
        return float(trials[0].arm == "gap, depth 1")


def test_the_best_is_chosen_by_the_validation_images(setup, told):
    study = DepthStudy(setup, depths=[1, 2])
    _analyse(told, study, {"cls": {1: 0.5, 2: 0.9}, "gap": {1: 0.6, 2: 0.8}})
    result = study.analyse(Chosen(study.setup.folder))
    assert "Best on validation: gap with depth 1, with 59.9 % of the test images right." in result.headline


def test_the_curve_and_the_table_hold_what_was_measured(setup, told):
    study = DepthStudy(setup, depths=[3, 1])
    result = _analyse(told, study, {"cls": {1: 0.5, 3: 0.75}, "gap": {1: 0.25, 3: 1.0}})
    curve, steps = result.figures
    assert [line.label for line in curve.lines] == ["cls", "gap"]
    assert [x for x, _ in curve.lines[0].points] == [1, 3]
    assert [y for _, y in curve.lines[1].points] == pytest.approx([0.25, 1.0], abs=0.001)
    for line in curve.lines:
        assert all(low <= y <= high for (_, y), (low, high) in zip(line.points, line.bands, strict=True))
    assert [row[0] for row in steps.rows] == ["cls: 3 minus 1", "gap: 3 minus 1"]
    assert steps.rows[1][1] == pytest.approx(0.75, abs=0.002)
    assert [row[0] for row in result.tables[0].rows] == [
        f"{h}, depth {d}" for h in ("cls", "gap") for d in (1, 3)
    ]
    assert result.values["top1"]["gap"]["3"] == pytest.approx([1.0] * 3)


def test_more_depth_that_hurts_is_refuted_and_no_change_is_not_a_gain(setup, told):
    study = DepthStudy(setup, depths=[1, 2], heads=["cls"])
    result = _analyse(told, study, {"cls": {1: 0.9, 2: 0.7}})
    assert [one.verdict for one in result.findings] == [REFUTED]
    assert result.headline.startswith("Refuted: cls, depth 2 is worse than cls, depth 1 by 20.0 points")


def test_little_difference_cannot_be_told(setup, told):
    study = DepthStudy(replace(setup, margin=0.001), depths=[1, 2])
    result = _analyse(told, study, {"cls": {1: 0.80, 2: 0.802}, "gap": {1: 0.80, 2: 0.802}})
    assert {one.verdict for one in result.findings} <= {CANNOT_TELL, EQUIVALENT}
    assert result.headline.startswith("Cannot tell:")


def test_the_slope_is_that_of_a_fit_to_the_mean_accuracies(generator):
    rng = np.random.default_rng(0)
    right = {depth: rng.random((2, 50)) < 0.2 * depth for depth in (1, 2, 3, 4)}
    means = [right[depth].mean() for depth in right]
    expected = np.polyfit(np.log2(list(right)), means, 1)[0]
    assert depth_slopes(right).mean() == pytest.approx(expected)


def test_only_depth_and_head_differ_between_arms(setup):
    study = DepthStudy(setup, depths=[1, 2, 6])
    trials = study.trials()
    assert len(trials) == 2 * 3 * 3
    assert {(t.model["pool"], t.model["depth"], t.seed) for t in trials} == {
        (head, depth, seed) for head in ("cls", "gap") for depth in (1, 2, 6) for seed in range(3)
    }
    changing = ("pool", "depth", "class_token")
    rest = [({k: v for k, v in t.model.items() if k not in changing}, t.optim, t.epochs) for t in trials]
    assert all(one == rest[0] for one in rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [2]}, "--depths needs two or more.*got 2"),
        ({"depths": []}, "--depths needs two or more.*got none"),
        ({"depths": [0, 1]}, "--depths needs.*got 0,1"),
        ({"depths": [2, 2]}, "--depths needs.*different.*got 2,2"),
        ({"heads": []}, "--heads needs.*got none"),
        ({"heads": ["cls", "cls"]}, "--heads needs.*different.*got cls,cls"),
        ({"heads": ["cls", "gab"]}, "gab"),
    ],
)
def test_impossible_options_are_refused(setup, options, message):
    with pytest.raises(ConfigError, match=message):
        DepthStudy(setup, **options)


def test_weights_with_a_depth_of_their_own_are_refused(tmp_path):
    setup = Setup("digits", tmp_path, recipe=Recipe(pretrained="model.safetensors"))
    with pytest.raises(
        ConfigError, match=r"fresh weights.*depth of their own.*got --recipe.pretrained model"
    ):
        DepthStudy(setup)


def test_a_depth_of_the_recipe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--recipe.depth 5 has no effect.*--depths"):
        DepthStudy(Setup("digits", tmp_path, recipe=Recipe(depth=5)))
