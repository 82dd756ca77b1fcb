"""Study causal: two exact answers on models that were not even trained, and the rest on made ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vit_cls.lab.studies.causal import (
    CAUSAL_GAP,
    FIRST,
    FREE,
    FREE_LAST,
    GAP,
    LAST,
    MIDDLE,
    CausalStudy,
    largest_change,
    largest_spread,
    sees_nothing,
)
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Answers, Setup
from vit_cls.lab.studies.trials import RUN, Spread, run_trials, trial_folder
from vit_cls.stats.verdicts import EQUIVALENT, REFUTED, SUPPORTED
from vit_cls.weights.bundle import MODEL_FILE, save_classifier
from vit_cls.weights.factory import create_classifier

TESTED = 599
SAME = "Without a mask it makes no difference where the class token stands."
BLIND = "In a causal encoder a class token that stands first does no better than the majority class."


def _fresh(run_dir, train, val, *, origin, seed, model, optim, loader, epochs):
    """A model of the seed whose weights are large enough for tokens to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = create_classifier(class_names=train.index.class_names, **model)
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.mul_(4)
    run_dir.mkdir(parents=True)
    return save_classifier(classifier, run_dir / MODEL_FILE)


@pytest.fixture
def study(tmp_path):
    recipe = Recipe(epochs=1, embed_dim=8, depth=2, num_heads=2)
    return CausalStudy(Setup("digits", tmp_path / "study", seeds=2, recipe=recipe))


@pytest.fixture
def fresh(study):
    run_trials(study.trials(), study.setup.folder, _fresh, Spread())
    return Answers(study.setup.folder)


def test_without_a_mask_the_place_changes_nothing_and_with_it_the_first_sees_nothing(study, fresh):
    result = study.analyse(fresh)
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
        assert largest_spread(fresh, arms[arm]) > 0.01
    for arm in (FIRST, MIDDLE, LAST):
        assert largest_change(fresh, arms[FREE], arms[arm]) > 1e-3
    assert largest_change(fresh, arms[GAP], arms[CAUSAL_GAP]) > 1e-3


def test_the_curve_places_the_class_token_before_none_half_and_all_patches(study, fresh):
    curve = study.analyse(fresh).figures[0]
    assert [x for x, _ in curve.lines[0].points] == [0, 8, 16]
    assert curve.marks["majority class"] == pytest.approx(61 / TESTED)


def test_a_constant_answer_is_compared_with_the_majority_class_of_the_images():
    targets = np.array([0] * 5 + [1] * 3 + [2] * 2)
    found = sees_nothing(BLIND, np.stack([targets == 1, targets == 2]), targets, 0.0)
    assert found.estimate == pytest.approx(0.25 - 0.5)
    assert found.counts == {"seeds": 2, "images": 10, "images of the majority class": 5}
    assert "25.0 %, where the majority class has 50.0 %. That is exact, in each of 2 seeds." in found.sentence


def _right(share):
    return [np.roll(np.arange(TESTED) < round(share * TESTED), seed) for seed in range(2)]


def _analyse(study, told, shares):
    for arm, trials in study.arms().items():
        told(study.setup.folder, trials, _right(shares[arm]))
    folder = trial_folder(study.setup.folder, study.arms()[FIRST][0]) / RUN
    parts = study.setup.trial_data.parts(0)
    model = dict(study.arms()[FIRST][0].model)
    _fresh(folder, parts.train, parts.val, origin="", seed=0, model=model, optim={}, loader={}, epochs=1)
    return study.analyse(Answers(study.setup.folder))


SHARES = {FREE: 0.9, FREE_LAST: 0.9, FIRST: 0.05, MIDDLE: 0.6, LAST: 0.9, GAP: 0.9, CAUSAL_GAP: 0.8}


def test_what_the_mask_costs_is_judged(study, told):
    result = _analyse(study, told, SHARES)
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


def test_what_should_be_exact_and_is_not_is_judged_like_all_else(study, told):
    result = _analyse(study, told, {**SHARES, FREE_LAST: 0.8, FIRST: 0.5})
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


def test_arms_differ_in_mask_and_place_alone(study):
    changing = ("pool", "class_token", "causal", "class_position")
    trials = study.trials()
    assert len(trials) == 7 * 2
    rest = [({k: v for k, v in t.model.items() if k not in changing}, t.optim, t.epochs) for t in trials]
    assert all(one == rest[0] for one in rest)
