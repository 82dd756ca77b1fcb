"""Study position: models without positions cannot tell the order of patches, and made answers are judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.position import (
    FIXED,
    GAP_LEARNED,
    GAP_NONE,
    LEARNED,
    NONE,
    UNPLACED,
    PositionStudy,
    without_order,
)
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import Spread, run_trials
from vit_cls.stats.verdicts import EQUIVALENT, REFUTED, SUPPORTED
from vit_cls.weights.factory import create_classifier

TESTED = 599


@pytest.fixture
def study(tmp_path):
    recipe = Recipe(epochs=1, embed_dim=8, depth=2, num_heads=2)
    return PositionStudy(Setup("digits", tmp_path / "study", seeds=2, recipe=recipe))


def test_only_models_without_positions_cannot_tell_the_order_of_patches(study, loud):
    run_trials(study.trials(), study.setup.folder, loud, Spread())
    result = study.analyse(Answers(study.setup.folder))
    change = result.values["shuffled_patches_largest_change"]
    assert set(change) == {LEARNED, UNPLACED, FIXED, NONE, GAP_LEARNED, GAP_NONE}
    for arm, size in change.items():
        if arm in (NONE, GAP_NONE):
            assert size < 1e-5, arm
            shuffled = result.values["top1_shuffled_patches"][arm]
            assert np.array_equal(shuffled, result.values["top1"][arm]), arm
        else:
            assert size > 1e-3, arm
    rows = {row[0]: row for row in result.tables[1].rows}
    assert rows[NONE][4] == 0
    assert rows[LEARNED][-1] == change[LEARNED]


def test_the_order_is_that_of_the_seed_and_the_model_is_left_as_it_was(study, loud):
    trial = study.arms()[LEARNED][0]
    run_trials([trial], study.setup.folder, loud, Spread())
    answers = Answers(study.setup.folder)
    before = answers.probs(trial)[0].copy()
    first, again = without_order(answers, trial), without_order(answers, trial)
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1] > 0
    assert np.array_equal(answers.probs(trial)[0], before)


def test_without_a_position_the_class_token_is_the_same_function(study):
    """A learned token plus a learned position is a learned token."""
    names = [str(i) for i in range(10)]
    base = dict(study.arms()[LEARNED][0].model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        placed = create_classifier(class_names=names, **base).eval()
        unplaced = create_classifier(class_names=names, **{**base, "no_embed_class": True}).eval()
    state = placed.model.state_dict()
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    unplaced.model.load_state_dict(state)
    images = torch.randint(
        0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(placed(images), unplaced(images))


def test_claims_about_positions_are_judged(study, answered, monkeypatch):
    monkeypatch.setattr(
        "vit_cls.lab.studies.position.without_order", lambda answers, trial: (np.zeros(TESTED, bool), 1.0)
    )
    shares = {LEARNED: 0.95, UNPLACED: 0.95, FIXED: 0.85, NONE: 0.6, GAP_LEARNED: 0.9, GAP_NONE: 0.9}
    result = study.analyse(answered(study, shares))
    found = {one.claim: one for one in result.findings}
    assert {claim: one.verdict for claim, one in found.items()} == {
        "A class token does as well without a position.": EQUIVALENT,
        "Fixed positions do as well as learned ones.": REFUTED,
        "Without positions, cls does worse.": SUPPORTED,
        "Without positions, gap does worse.": EQUIVALENT,
        "cls and gap need positions to a different degree.": SUPPORTED,
    }
    assert found["Fixed positions do as well as learned ones."].estimate == pytest.approx(-0.1, abs=0.002)
    last = found["cls and gap need positions to a different degree."]
    assert last.estimate == pytest.approx(0.35, abs=0.002)
    assert "what positions give to cls is larger than what positions give to gap" in last.sentence
    assert result.headline.startswith("Equivalent: cls, learned and cls, class token without are the same")
    assert "cls, none is worse than cls, learned by 35.1 points" in result.headline
    drawn = {label: size for label, size, _ in result.figures[0].rows}
    assert drawn[f"{GAP_NONE} minus {GAP_LEARNED}"] == pytest.approx(0, abs=1e-9)
