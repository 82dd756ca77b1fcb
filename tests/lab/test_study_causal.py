"""Study causal: two exact answers on models that were not even trained, and the rest on made ones."""

from __future__ import annotations

import numpy as np
import pytest

from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.causal import (
    BLIND,
    CAUSAL_GAP,
    FIRST,
    FREE,
    FREE_LAST,
    GAP,
    LAST,
    MIDDLE,
    SAME,
    CausalStudy,
    largest_change,
    largest_spread,
    sees_nothing,
)
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import RUN, Spread, run_trials, trial_folder
from vit_cls.stats.verdicts import EQUIVALENT, REFUTED, SUPPORTED

TESTED = 599


@pytest.fixture
def study(tmp_path):
    recipe = Recipe(epochs=1, embed_dim=8, depth=2, num_heads=2)
    return CausalStudy(Setup("digits", tmp_path / "study", seeds=2, recipe=recipe))


@pytest.fixture
def answers(study, loud):
    run_trials(study.trials(), study.setup.folder, loud, Spread())
    return Answers(study.setup.folder)


def test_without_a_mask_the_place_changes_nothing_and_with_it_the_first_sees_nothing(study, answers):
    result = study.analyse(answers)
    found = {one.claim: one for one in result.findings}
    assert found[SAME].verdict == EQUIVALENT
    assert "to the bit" in found[SAME].sentence
    assert found[SAME].estimate == 0
    assert result.values["bidirectional_largest_change"] == 0
    assert found[BLIND].verdict == SUPPORTED
    assert result.values["causal_first_largest_spread"] <= 1e-6
    assert found[BLIND].estimate <= 0
    arms = study.arms()
    for arm in (MIDDLE, LAST, FREE):  # the test could fail: these do see the images
        assert largest_spread(answers, arms[arm]) > 0.01
    for arm in (FIRST, MIDDLE, LAST):
        assert largest_change(answers, arms[FREE], arms[arm]) > 1e-3
    assert largest_change(answers, arms[GAP], arms[CAUSAL_GAP]) > 1e-3


def test_the_curve_places_the_class_token_before_none_half_and_all_patches(study, answers):
    curve = study.analyse(answers).figures[0]
    assert [x for x, _ in curve.lines[0].points] == [0, 8, 16]
    assert curve.marks["majority class"] == pytest.approx(61 / TESTED)


def test_a_constant_answer_is_compared_with_the_majority_class_of_the_images():
    targets = np.array([0] * 5 + [1] * 3 + [2] * 2)
    found = sees_nothing(BLIND, np.stack([targets == 1, targets == 2]), targets, 0.0)
    assert found.estimate == pytest.approx(0.25 - 0.5)
    assert found.counts == {"seeds": 2, "images": 10, "images of the majority class": 5}
    assert "25.0 %, where the majority class has 50.0 %. That is exact, in each of 2 seeds." in found.sentence


@pytest.fixture
def judged(study, answered, loud):
    """A function to the result where arms have shares of the images right."""

    def judge(shares):
        answers = answered(study, shares)
        trial, parts = study.arms()[FIRST][0], study.setup.trial_data.parts(0)
        folder = trial_folder(study.setup.folder, trial) / RUN  # the chart asks it for its patches
        settings = {"model": dict(trial.model), "optim": {}, "loader": {}, "epochs": 1}
        loud(folder, parts.train, parts.val, origin="", seed=0, **settings)
        return study.analyse(answers)

    return judge


SHARES = {FREE: 0.9, FREE_LAST: 0.9, FIRST: 0.05, MIDDLE: 0.6, LAST: 0.9, GAP: 0.9, CAUSAL_GAP: 0.8}


def test_what_the_mask_costs_is_judged(judged):
    result = judged(SHARES)
    verdicts = {one.claim: one.verdict for one in result.findings}
    assert verdicts == {
        SAME: EQUIVALENT,
        BLIND: SUPPORTED,
        "A causal encoder does as well if its class token stands last.": EQUIVALENT,
        "In a causal encoder, cls in the middle does worse than last.": SUPPORTED,
        "The mean of the patches does as well in a causal encoder.": REFUTED,
    }
    assert result.headline.startswith(
        "Equivalent: bidirectional, cls first and causal, cls last are the same"
    )
    assert "first 5.0 %, middle 59.9 %, last 90.0 %" in result.headline
    costs = {label: size for label, size, _ in result.figures[1].rows}
    assert costs[f"{MIDDLE} minus {FREE}"] == pytest.approx(-0.3, abs=0.002)
    assert costs[f"{CAUSAL_GAP} minus {GAP}"] == pytest.approx(-0.1, abs=0.002)
    assert [row[0] for row in result.tables[0].rows] == list(SHARES)


def test_what_should_be_exact_and_is_not_is_judged_like_all_else(judged):
    result = judged({**SHARES, FREE_LAST: 0.8, FIRST: 0.5})
    found = {one.claim: one for one in result.findings}
    assert found[SAME].verdict == REFUTED
    assert found[SAME].estimate == pytest.approx(-0.1, abs=0.002)
    assert found[BLIND].verdict == REFUTED
    assert found[BLIND].estimate == pytest.approx(0.4, abs=0.01)
    assert result.values["bidirectional_largest_change"] == 1


def test_training_keeps_the_identity(tmp_path):
    from vit_cls.training.trial import train_trial

    recipe = Recipe(epochs=2, embed_dim=8, depth=2, num_heads=2)
    study = CausalStudy(Setup("digits", tmp_path / "study", seeds=1, recipe=recipe))
    arms = study.arms()
    kept = [arms[arm][0] for arm in (FREE, FREE_LAST, FIRST)]
    run_trials(kept, study.setup.folder, train_trial, Spread())
    answers = Answers(study.setup.folder)
    assert largest_change(answers, arms[FREE], arms[FREE_LAST]) == 0
    assert largest_spread(answers, arms[FIRST]) <= 1e-6
    assert largest_spread(answers, arms[FREE]) > 1e-3
