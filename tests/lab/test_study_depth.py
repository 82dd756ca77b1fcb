"""Study depth: what each step adds, and whether the class token gains more; on answers that were made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.depth import DepthStudy
from vit_cls.lab.studies.study import Setup
from vit_cls.stats.verdicts import CANNOT_TELL, EQUIVALENT, REFUTED, SUPPORTED

TESTED = 599


@pytest.fixture
def setup(tmp_path):
    return Setup("digits", tmp_path / "study", seeds=3)


def _shares(by_head):
    return {f"{head}, depth {depth}": s for head, row in by_head.items() for depth, s in row.items()}


def test_gains_and_the_difference_of_gains_are_found(setup, answered):
    study = DepthStudy(setup, depths=[1, 2, 4])
    shares = {"cls": {1: 0.5, 2: 0.7, 4: 0.9}, "gap": {1: 0.7, 2: 0.8, 4: 0.8}}
    result = study.analyse(answered(study, _shares(shares)))
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


def test_the_best_is_chosen_by_the_validation_images(setup, answered):
    study = DepthStudy(setup, depths=[1, 2])
    answered(study, _shares({"cls": {1: 0.5, 2: 0.9}, "gap": {1: 0.6, 2: 0.8}}))
    result = study.analyse(Chosen(study.setup.folder))
    assert "Best on validation: gap with depth 1, with 59.9 % of the test images right." in result.headline


def test_the_curve_and_the_table_hold_what_was_measured(setup, answered):
    study = DepthStudy(setup, depths=[3, 1])
    result = study.analyse(answered(study, _shares({"cls": {1: 0.5, 3: 0.75}, "gap": {1: 0.25, 3: 1.0}})))
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


def test_more_depth_that_hurts_is_refuted_and_no_change_is_not_a_gain(setup, answered):
    study = DepthStudy(setup, depths=[1, 2], heads=["cls"])
    result = study.analyse(answered(study, _shares({"cls": {1: 0.9, 2: 0.7}})))
    assert [one.verdict for one in result.findings] == [REFUTED]
    assert result.headline.startswith("Refuted: cls, depth 2 is worse than cls, depth 1 by 20.0 points")


def test_little_difference_cannot_be_told(setup, answered):
    study = DepthStudy(replace(setup, margin=0.001), depths=[1, 2])
    result = study.analyse(answered(study, _shares({"cls": {1: 0.80, 2: 0.802}, "gap": {1: 0.80, 2: 0.802}})))
    assert {one.verdict for one in result.findings} <= {CANNOT_TELL, EQUIVALENT}
    assert result.headline.startswith("Cannot tell:")
