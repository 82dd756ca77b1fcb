"""``study heads``: each head at its own rate, which the validation images choose; on made answers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from vit_cls.errors import RunError
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.heads import HeadsStudy
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import ANSWERS, Spread, run_trials, trial_folder
from vit_cls.stats.verdicts import SUPPORTED, Claim, judge_all

HAND_MADE = {"cls": (0.5, 0.9, 0.7), "gap": (0.95, 0.6, 0.5)}
"""Shares of the images that are right at half, once and twice the rate."""


@pytest.fixture
def study(tmp_path):
    """A function to a study of two heads."""

    def make(lr_grid=1, heads=("cls", "gap")):
        return HeadsStudy(Setup("digits", tmp_path, seeds=2), heads=heads, lr_grid=lr_grid)

    return make


def _shares(by_head, factors=("0.5", "1", "2")):
    return {f"{head}, lr x{f}": s for head, row in by_head.items() for f, s in zip(factors, row, strict=True)}


def _rewrite(study, change):
    """Change the arrays of each trial's answers."""
    for trial in study.trials():
        file = trial_folder(study.setup.folder, trial) / ANSWERS
        arrays = dict(np.load(file))
        change(trial, arrays)
        np.savez(file, **arrays)


def test_rankings_differ_between_tuned_and_shared_rates(study, answered):
    study = study(lr_grid=3)
    result = study.analyse(answered(study, _shares(HAND_MADE)))
    assert result.values["tuned_lr"] == {"cls": 0.003, "gap": 0.0015}
    best, ranks, shared, pairs = result.tables
    assert [list(row[:2]) for row in pairs.rows] == [["gap", "cls"]]
    assert pairs.rows[0][2] == pytest.approx(0.05, abs=0.001)
    assert [row[0] for row in best.rows] == ["gap", "cls"]
    assert [list(row) for row in ranks.rows] == [[1, "gap", "cls"], [2, "cls", "gap"]]
    assert [row[0] for row in shared.rows] == ["cls", "gap"]
    assert best.rows[0][1] == pytest.approx(0.95, abs=0.001)
    assert shared.rows[1][1] == pytest.approx(0.6, abs=0.001)
    assert result.headline.startswith("Supported: gap is better than cls by 5.0 points")
    assert "Best on validation: gap, with 95.0 % of the test images right." in result.headline


def test_of_equal_rates_the_one_nearest_to_the_shared_wins(study, answered):
    study = study(lr_grid=3)
    shares = _shares({"cls": (0.8, 0.8, 0.8), "gap": (0.8, 0.7, 0.8)})
    assert study.analyse(answered(study, shares)).values["tuned_lr"] == {"cls": 0.003, "gap": 0.0015}


def test_the_choice_of_rates_never_sees_the_test_images(study, answered):
    study = study(lr_grid=3)
    before = study.analyse(answered(study, _shares(HAND_MADE)))
    rng = np.random.default_rng(0)
    _rewrite(study, lambda _, arrays: rng.shuffle(arrays["test_targets"]))
    after = study.analyse(Answers(study.setup.folder))
    assert after.values["tuned_lr"] == before.values["tuned_lr"]
    assert after.values["top1"]["gap"].max() < 0.3 < before.values["top1"]["gap"].min()


def test_the_head_called_best_is_not_chosen_by_the_test_images(study, answered):
    study = study()
    answered(study, {"cls, lr x1": 0.9, "gap, lr x1": 0.8})

    def spoil(trial, arrays):
        if trial.arm == "cls":  # now it has no test image right
            arrays["test_probs"] = np.roll(np.eye(10, dtype=np.float32)[arrays["test_targets"]], 1, axis=1)

    _rewrite(study, spoil)
    headline = study.analyse(Answers(study.setup.folder)).headline
    assert headline.endswith("Best on validation: cls, with 0.0 % of the test images right.")


def test_a_result_names_every_test_image_and_what_was_said_of_it(study, answered):
    study = study()
    found = study.analyse(answered(study, {"cls, lr x1": 1.0, "gap, lr x1": 0.0})).predictions
    classes, targets = found["class_names"], found["targets"]
    assert [path.partition("/")[0] for path in found["paths"]] == [classes[i] for i in targets]
    for seed in ("0", "1"):
        assert found["predictions"]["cls"][seed] == targets
        assert all(a != b for a, b in zip(found["predictions"]["gap"][seed], targets, strict=True))


def test_a_rate_at_which_a_training_failed_is_left_out_and_said(study, counting):
    study = study(lr_grid=2)
    bad = next(t for t in study.trials() if (t.arm, t.seed, t.variant) == ("gap", 1, "lr x1"))
    train = counting({bad.key: RunError("the loss is not finite.")})
    assert run_trials(study.trials(), study.setup.folder, train, Spread()) == 0
    result = study.analyse(Answers(study.setup.folder))
    assert result.values["tuned_lr"]["gap"] == 0.5 * study.setup.recipe.lr
    assert [note for note in result.notes if "failed" in note] == [
        "gap: learning rate 0.003 failed and was left out."
    ]


def test_no_rate_that_worked_is_an_error_that_says_why(study, counting):
    study = study()
    errors = {trial.key: RunError(f"broken {trial.arm}{trial.seed}.") for trial in study.trials()[3:]}
    run_trials(study.trials(), study.setup.folder, counting(errors), Spread())
    with pytest.raises(RunError, match=r"no learning rate worked for gap: broken gap1"):
        study.analyse(Answers(study.setup.folder))


def test_equal_heads_have_names_of_their_own_and_do_not_win(study, fresh):
    study = study(heads=["gap", "gap"])
    run_trials(study.trials(), study.setup.folder, fresh(), Spread())
    result = study.analyse(Answers(study.setup.folder))
    assert result.findings[0].verdict != SUPPORTED
    assert set(result.predictions["predictions"]) == {"gap", "gap (2)"}


def test_equal_heads_seldom_win():
    """A against A: each head trained anew has luck of its own, in seeds and in images."""
    rng = np.random.default_rng(0)
    winners = 0
    for _ in range(100):
        hard = rng.normal(2.5, 1.5, 400)
        a, b = (hard + rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 1, (3, 400)) > 0 for _ in range(2))
        winners += judge_all([Claim("gap (2) and gap differ.", a, b)], seed=0)[0].verdict == SUPPORTED
    assert winners <= 5


def test_every_head_is_trained_at_every_rate_under_every_seed(study):
    trials = study(lr_grid=5).trials()
    assert [(t.arm, t.optim["lr"], t.seed) for t in trials] == [
        (head, pytest.approx(0.003 * factor), seed)
        for head, factor, seed in product(("cls", "gap"), (0.25, 0.5, 1, 2, 4), (0, 1))
    ]
