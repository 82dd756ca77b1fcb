"""What holds for every study of the table, with models that are not trained; and what all refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vit_cls.errors import ConfigError, RunError
from vit_cls.lab.results import plain
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.folder import claim_folder
from vit_cls.lab.studies.recipe import RECIPES, Recipe
from vit_cls.lab.studies.study import Control, Setup, Study, least_squares_slope
from vit_cls.lab.studies.table import STUDIES
from vit_cls.lab.studies.trials import Spread, run_trials
from vit_cls.reports.folder import write_folder
from vit_cls.reports.terminal import text
from vit_cls.stats.verdicts import EQUAL, VERDICTS

SMALL = Recipe(epochs=1, embed_dim=8, depth=1, num_heads=2)
OPTIONS: dict[str, dict] = {
    "heads": {"heads": ("cls", "gap"), "lr_grid": 2},
    "any-token": {"tokens": ("cls", "centre", "gap")},
    "refine": {"permutations": 2},
    "depth": {"depths": (1, 2)},
    "when": {"heads": ("gap", "cls"), "side": 2, "distractors": "noise"},
    "specialise": {"counts": (1, 2)},
}
"""Of studies whose defaults take many trainings."""
KEYS = {
    "kind", "question", "headline", "findings", "tables", "figures", "settings", "data", "values",
    "predictions", "notes", "seconds",
}  # fmt: skip


def _study(name: str, folder: Path, *, seeds: int = 2) -> Study:
    recipe = replace(SMALL, depth=None) if name == "depth" else SMALL
    return STUDIES[name](Setup("digits", folder, seeds=seeds, recipe=recipe), **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_answers_its_question_once_and_the_same_again(name, tmp_path, fresh):
    folder, trained = tmp_path / "study", []

    def train(run_dir, *args, **settings):
        trained.append(run_dir.parent.name)
        return fresh()(run_dir, *args, **settings)

    study = _study(name, folder)
    assert study.name == name
    assert claim_folder(folder, study, {"test": "images"})
    trials = study.trials()
    assert run_trials(trials, folder, train, Spread()) == 0
    assert sorted(trained) == sorted(trial.key for trial in trials)
    assert {trial.seed for trial in trials} == {0, 1}
    result = study.analyse(Answers(folder))
    told = result.to_dict(predictions=True)
    assert set(told) == KEYS
    assert (result.kind, result.question) == (f"study {name}", study.question)
    assert result.headline.split(":")[0].lower() in VERDICTS
    assert len({one.claim for one in result.findings}) == len(result.findings) > 0
    assert all(one.sentence and one.counts["images"] > 100 for one in result.findings)
    assert all(len(row) == len(table.columns) for table in result.tables for row in table.rows)
    assert told["settings"].items() >= plain(study.settings()).items()
    assert len(told["predictions"]["paths"]) == len(told["predictions"]["targets"]) == 599
    assert told["values"]["top1"]
    assert result.notes
    assert result.headline in text(result)
    write_folder(folder, result, versions={})

    again = _study(name, folder)  # as of the same command
    assert not claim_folder(folder, again, {"test": "images"})
    assert run_trials(again.trials(), folder, train, Spread()) == 0
    assert len(trained) == len(trials)
    assert json.dumps(again.analyse(Answers(folder)).to_dict(predictions=True)) == json.dumps(told)
    with pytest.raises(RunError, match=r"holds a study with another seeds: \[0, 1\] there, \[0\] now"):
        claim_folder(folder, _study(name, folder, seeds=1), {"test": "images"})
    with pytest.raises(RunError, match="a study of other images: in the test part of digits"):
        claim_folder(folder, again, {"test": "others"})


REFUSED = {
    "heads": [
        ({"heads": ["cls"]}, r"--heads needs two or more, such as cls,gap; got cls"),
        ({"heads": ["cls", "gab"]}, r"gab"),
        ({"lr_grid": 4}, r"--lr_grid must be one of 1, 2, 3, 5; got 4"),
    ],
    "any-token": [
        ({"tokens": ["cls", "middle"]}, r"--tokens must be one of .*got 'middle'"),
        ({"tokens": ["cls", "token:99"]}, r"--tokens token:K needs a patch K from 0 to 15"),
        ({"tokens": ["first", "gap"]}, r"--tokens needs cls and one patch at least.*got first, gap"),
        ({"tokens": ["cls", "gap"]}, r"--tokens needs cls and one patch at least"),
        ({"modes": ["froze"]}, r"--modes must be one of .*got 'froze'.*frozen"),
        ({"modes": []}, r"--modes needs one or more"),
    ],
    "refine": [
        ({"permutations": 0}, r"--permutations must be at least 1; got 0"),
        ({"model": "m", "recipe": Recipe(epochs=2)}, r"--recipe says .* but --model m is given"),
    ],
    "depth": [
        ({"depths": [2]}, r"--depths needs two or more.*got 2"),
        ({"depths": []}, r"--depths needs two or more.*got none"),
        ({"depths": [0, 1]}, r"--depths needs.*got 0,1"),
        ({"depths": [2, 2]}, r"--depths needs.*different.*got 2,2"),
        ({"heads": []}, r"--heads needs.*got none"),
        ({"heads": ["cls", "cls"]}, r"--heads needs.*different.*got cls,cls"),
        ({"heads": ["cls", "gab"]}, r"gab"),
        ({"recipe": Recipe(pretrained="file")}, r"fresh weights.*depth of their own; got .*pretrained file"),
        ({"recipe": Recipe(depth=5)}, r"--recipe.depth 5 has no effect.*--depths"),
    ],
    "position": [
        ({"recipe": Recipe(pretrained="file")}, r"positions of their own; got --recipe.pretrained file"),
    ],
    "when": [
        ({"heads": ("cls", "max")}, r"--heads needs gap.*got cls, max"),
        ({"heads": ("gap",)}, r"and another one; got gap"),
        ({"heads": ("gap", "cls", "cls")}, r"each head once; got gap, cls, cls"),
        ({"heads": ("gap", "clss")}, r"got 'clss'"),
        ({"side": 1}, r"--side must be at least 2; got 1"),
        ({"distractors": "nois"}, r"--distractors must be one of classes, noise; got 'nois'"),
        ({"tile": 6}, r"--tile must be a multiple of the patch size.*got 6 and 4 pixels"),
        ({"recipe": Recipe(img_size=64)}, r"--recipe.img_size 64 has no effect.*--side and --tile"),
        ({"recipe": Recipe(augment="affine")}, r"--recipe.augment affine has no effect"),
    ],
    "specialise": [
        ({"counts": (2, 4)}, r"--counts needs 1.*got 2, 4"),
        ({"counts": (1,)}, r"and a larger number; got 1"),
        ({"counts": (0, 1, 2)}, r"--counts needs 1.*got 0, 1, 2"),
        ({"counts": (1, 2, 2)}, r"--counts must name each one once; got 1, 2, 2"),
        ({"variants": ("mean", "divers")}, r"--variants must be one of mean, concat, diverse; got 'divers'"),
        ({"variants": ("concat",)}, r"--variants needs mean.*got concat"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_options_that_make_no_study_are_refused(name, options, message, tmp_path):
    recipe = options.get("recipe", Recipe())
    own = {key: value for key, value in options.items() if key != "recipe"}
    with pytest.raises(ConfigError, match=message):
        STUDIES[name](Setup("digits", tmp_path, recipe=recipe), **own)


def _rest(trial, but: tuple[str, ...]):
    return {k: v for k, v in trial.model.items() if k not in but}, trial.optim, trial.loader, trial.epochs


@pytest.mark.parametrize(
    ("name", "models", "but"),
    [
        ("depth", 4, ("pool", "class_token", "depth")),
        ("causal", 7, ("pool", "class_token", "causal", "class_position")),
        ("position", 6, ("pool", "class_token", "pos_embed", "no_embed_class")),
        ("specialise", 5, ("pool", "reg_tokens")),
    ],
)
def test_arms_differ_in_nothing_else_than_what_the_study_is_about(name, models, but, tmp_path):
    trials = _study(name, tmp_path).trials()
    assert len({trial.key for trial in trials}) == len(trials) == 2 * models
    assert len({json.dumps(trial.model, sort_keys=True) for trial in trials}) == models
    assert all(_rest(trial, but) == _rest(trials[0], but) for trial in trials)


class _Toy(Study):
    """The least that a study is, with controls of both kinds."""

    name = "toy"
    question = "Is a toy a study?"

    def arms(self):
        return self.setup.arms({pool: self.setup.head(pool) for pool in ("cls", "gap")})

    def control_arms(self):
        return {"shuffled_labels": self.setup.trials("shuffled")}

    def claims(self, measured):
        return measured.claims([("cls and gap are the same.", "cls", "gap", EQUAL)], self.setup.margin)

    def controls(self, measured):
        right = next(iter(measured.right.values()))
        return [*super().controls(measured), Control("none", np.zeros_like(right))]


def test_a_study_is_its_arms_and_claims_and_controls_come_into_table_and_values(tmp_path, answered):
    study = _Toy(Setup("digits", tmp_path, seeds=2))
    assert len(study.trials()) == 6
    result = study.analyse(answered(study, {"cls": 0.9, "gap": 0.9, "shuffled": 0.1}))
    assert result.headline.startswith("Equivalent: cls and gap are the same within")
    arms, controls = result.tables
    assert [row[0] for row in arms.rows] == ["cls", "gap"]
    assert [row[:2] for row in controls.rows] == [
        ["shuffled_labels", pytest.approx(0.1, abs=0.001)],
        ["none", 0],
    ]
    assert set(result.values["top1"]) == {"cls", "gap"}
    assert result.values["controls"]["shuffled_labels"] == pytest.approx([0.1, 0.1], abs=0.001)
    assert result.values["controls"]["none"].tolist() == [0, 0]


def test_a_study_without_claims_says_what_is_missing(tmp_path, answered):
    study = _Toy(Setup("digits", tmp_path, seeds=1))
    study_without = type("Without", (_Toy,), {"claims": Study.claims})(study.setup)
    with pytest.raises(NotImplementedError, match="study toy says what it claims, or judges itself"):
        study_without.analyse(answered(study, {"cls": 0.9, "gap": 0.9, "shuffled": 0.1}))


def test_a_slope_is_that_of_a_fit_to_the_scores_of_every_seed_and_image():
    rng = np.random.default_rng(0)
    x, scores = [0.0, 1.0, 3.0, 4.0], [rng.random((2, 7)) < 0.5 for _ in range(4)]
    expected = np.polyfit(x, np.stack(scores).reshape(4, 14).astype(float), 1)[0].reshape(2, 7)
    np.testing.assert_allclose(least_squares_slope(x, scores), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1; got 0"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"margin": 0}, "--margin must be above 0 and below 1.*got 0"),
        ({"margin": 1.5}, "--margin must be above 0 and below 1.*got 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Setup("digits", Path("x"), **settings)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr"])
def test_a_recipe_needs_numbers_above_zero(name):
    with pytest.raises(ConfigError, match=rf"--recipe.{name} must be above 0; got 0"):
        Recipe(**{name: 0})


def test_a_recipe_is_filled_by_what_suits_the_data():
    assert Recipe().resolved("digits") == RECIPES["digits"]
    assert Recipe(lr=1.0).resolved("folder") == replace(RECIPES["scratch"], lr=1.0)
    tuned = Recipe(pretrained="weights").resolved("folder")
    assert tuned == replace(RECIPES["finetune"], pretrained="weights")
