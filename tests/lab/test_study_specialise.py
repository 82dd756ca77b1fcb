"""``study specialise``: the verdicts on several class tokens that are alike, apart, or made."""

from __future__ import annotations

import numpy as np
import pytest

from vit_cls.lab.features import Rows
from vit_cls.lab.studies import specialise
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.class_tokens import COLLAPSED, ArmTokens, ClassTokens, TokenAnswers
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.specialise import SpecialiseStudy
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import Spread, run_trials
from vit_cls.model.classifier import Preprocess


def _by_arm(table):
    """Rows of a table by column; of columns of one name the first."""
    return {row[0]: dict(reversed(list(zip(table.columns, row, strict=True)))) for row in table.rows}


def _alike(model):
    """Class tokens that start alike."""
    for values in (model.cls_token, model.pos_embed):
        values[:, 1 : model.layout.num_class_tokens] = values[:, :1]


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory, fresh):
    """The study on models whose class tokens are alike, and its result."""
    folder = tmp_path_factory.mktemp("collapsed")
    recipe = Recipe(epochs=1, depth=2, embed_dim=16)
    study = SpecialiseStudy(Setup("digits", folder, seeds=2, recipe=recipe), counts=(1, 2))
    assert run_trials(study.trials(), folder, fresh(_alike), Spread(1)) == 0
    return study.analyse(Answers(folder))


def test_each_arm_has_its_pooling_and_number_of_tokens(tmp_path):
    trials = SpecialiseStudy(Setup("digits", tmp_path, seeds=2)).trials()
    models = {trial.arm: trial.model for trial in trials}
    assert {arm: (m["pool"], m.get("reg_tokens")) for arm, m in models.items()} == {
        "cls": ("cls", None),
        "extra register": ("cls", 1),
        "mean 2": ("multicls:2", None),
        "mean 4": ("multicls:4", None),
        "concat 2": ("multicls-concat:2", None),
        "concat 4": ("multicls-concat:4", None),
        "diverse 2": ("multicls-diverse:2", None),
        "diverse 4": ("multicls-diverse:4", None),
    }


def test_alike_tokens_are_called_parallel_and_know_the_same(collapsed):
    parallel = collapsed.findings[0]
    assert parallel.verdict == "supported"
    assert parallel.estimate == pytest.approx(1.0, abs=1e-6)
    assert "the mean cosine of 2 class tokens after the final norm is 1.000" in parallel.sentence
    assert collapsed.headline.startswith("Supported: the mean cosine of 2 class tokens")
    alike = _by_arm(collapsed.tables[0])
    for arm in ("mean 2", "concat 2", "diverse 2"):
        assert alike[arm]["collapsed"] == "yes"
        assert alike[arm]["attention apart"] == pytest.approx(0.0, abs=1e-6)
        assert alike[arm]["cosine"] == pytest.approx(1.0, abs=1e-6)
    knows = _by_arm(collapsed.tables[1])["mean 2"]
    assert knows["pairs that disagree (%)"] == 0.0
    assert knows["any token right (%)"] == pytest.approx(knows["one token (%)"])
    np.testing.assert_allclose(collapsed.values["layer_cosine"]["mean 2"], 1.0, atol=1e-6)


def test_the_diverse_head_of_alike_tokens_says_the_same_of_every_image(collapsed):
    for seed in ("0", "1"):
        assert len(set(collapsed.predictions["predictions"]["diverse 2"][seed])) == 1
    cosine = [one for one in collapsed.findings if one.claim.startswith("The diverse head lowers")]
    assert [one.verdict for one in cosine] == ["equivalent"]


def test_accuracy_is_compared_with_one_token_and_with_a_register(collapsed):
    right = {arm: np.mean(rows) for arm, rows in collapsed.values["top1"].items()}
    for finding, arm in zip(collapsed.findings[1:3], ("cls", "extra register"), strict=True):
        assert finding.estimate == pytest.approx(right["mean 2"] - right[arm])
    rows = _by_arm(collapsed.tables[2])
    assert [rows[arm]["tokens"] for arm in ("cls", "extra register", "mean 2")] == [17, 18, 18]
    assert rows["cls"]["minus cls (%)"] is None
    gain = rows["extra register"]["minus cls (%)"]
    assert gain == pytest.approx(right["extra register"] - right["cls"])
    assert 0 <= rows["cls"]["ECE"] <= 1


RIGHT = {"cls": 0.5, "extra register": 0.6, "mean 2": 0.8, "mean 4": 0.7, "diverse 2": 0.4, "diverse 4": 0.3}
COSINES = {"mean 2": 0.9, "mean 4": 0.99, "diverse 2": 0.2, "diverse 4": 0.3}


def _made(arm: str, trials) -> ArmTokens:
    """Tokens all of whose pairs have the cosine above, each seed in a basis of its own."""
    count, images = int(arm.split()[1]), 30
    factor = np.linalg.cholesky(np.full((count, count), COSINES[arm]) + np.eye(count) * (1 - COSINES[arm]))
    rows = Rows(np.arange(images) % 3, ["a", "b", "c"], [""] * images, np.arange(images), {})
    answers = TokenAnswers(np.zeros((images, count), int), np.zeros(images, int), rows.labels, "ridge")
    tokens = []
    for trial in trials:
        rng = np.random.default_rng(trial.seed)
        bases = np.stack([np.linalg.qr(rng.standard_normal((8, 8)))[0][:count] for _ in range(images)])
        output = factor @ bases
        layers = np.stack([output] * 3, axis=1)
        tokens.append(ClassTokens(layers, output, None, None, rows, Preprocess((8, 8)), (4, 4)))
    return ArmTokens(tokens, [answers] * len(tokens), seed=0)


@pytest.fixture
def made(tmp_path, answered, monkeypatch):
    """A function to the result where tokens have the cosines above, and models are right for those shares."""
    monkeypatch.setattr(
        specialise, "measure_arm", lambda answers, trials, parts, seed: _made(trials[0].arm, trials)
    )

    def judge(*, seeds=2, margin=0.01, **options):
        study = SpecialiseStudy(Setup("digits", tmp_path, seeds=seeds, margin=margin), **options)
        return study, study.analyse(answered(study, RIGHT))

    return judge


def test_each_claim_is_about_the_arms_and_the_quantity_that_it_names(made):
    _, result = made(margin=0.05, counts=(1, 2, 4), variants=("mean", "diverse"))
    beat, lowers = "class tokens read by their mean beat", "The diverse head lowers the cosine of"
    found = [(one.claim, one.verdict, one.margin, one.null, one.unit) for one in result.findings]
    parallel = "class tokens read by their mean end parallel: their cosine is above 0.95."
    assert found == [
        (f"4 {parallel}", "supported", 0.01, 0.95, "of cosine"),
        (f"2 {parallel}", "refuted", 0.01, 0.95, "of cosine"),
        (f"4 {beat} one.", "supported", 0.05, 0.0, "points"),
        (f"4 {beat} one and a register.", "supported", 0.05, 0.0, "points"),
        (f"2 {beat} one.", "supported", 0.05, 0.0, "points"),
        (f"2 {beat} one and a register.", "supported", 0.05, 0.0, "points"),
        (f"{lowers} 4 class tokens.", "supported", 0.01, 0.0, "of cosine"),
        (f"{lowers} 2 class tokens.", "supported", 0.01, 0.0, "of cosine"),
    ]
    sizes = [0.99, 0.9, 0.2, 0.1, 0.3, 0.2, -0.69, -0.7]
    assert [one.estimate for one in result.findings] == pytest.approx(sizes, abs=0.002)
    starts = [
        "the mean cosine of 4 class tokens after the final norm is 0.990 (",
        "the mean cosine of 2 class tokens after the final norm is 0.900 (",
        "mean 4 is better than cls by ",
        "mean 4 is better than extra register by ",
        "mean 2 is better than cls by ",
        "mean 2 is better than extra register by ",
        "that of diverse 4 is lower than the cosine of mean 4 by 0.69 of cosine for ",
        "that of diverse 2 is lower than the cosine of mean 2 by 0.7 of cosine for ",
    ]
    for one, start in zip(result.findings, starts, strict=True):
        assert one.sentence.startswith(start)
    assert result.headline == f"Supported: {result.findings[0].sentence} {result.findings[2].sentence}"
    assert result.settings["cosine_margin"] == 0.01


def test_the_headline_and_the_table_compare_with_other_images_and_independent_models(made):
    study, result = made(seeds=3, counts=(1, 4), variants=("mean",))
    measured = _made("mean 4", study.arms()["mean 4"])
    chance = result.values["independent_models"]["mean 4"]
    assert chance["p"] == 1 / 500  # tokens of cosine 0.99 are not met again by dealing them out anew
    assert abs(chance["independent"]) < 0.1  # bases at random
    assert (
        f"; the same token on another image has {measured.other_image_cosine:.3f}, tokens of independent "
        f"models {chance['independent']:.3f} (p 0.0020)."
    ) in result.headline
    row = _by_arm(result.tables[0])["mean 4"]
    assert [row["independent models"], row["p"], row["smallest p"]] == list(chance.values())
    assert not any("two seeds at least" in note for note in result.notes)


def test_the_report_has_maps_for_each_token(collapsed):
    pictures = collapsed.figures[-1]
    assert list(pictures.columns) == [
        "image", "mean 2: token 1", "mean 2: token 2", "diverse 2: token 1", "diverse 2: token 2"
    ]  # fmt: skip
    assert list(pictures.row_labels) == ["0", "1", "2", "3", "4", "5"]
    for row in pictures.rows:
        assert np.array_equal(row[1], row[2])  # the tokens are alike
        assert row[1].shape == (8, 8, 3)
        assert row[1].max() == 255


def test_tokens_that_start_apart_are_less_parallel_before_training(tmp_path, fresh):
    study = SpecialiseStudy(
        Setup("digits", tmp_path, seeds=1, recipe=Recipe(epochs=1, depth=1, embed_dim=16)),
        counts=(1, 2),
        variants=("mean",),
    )
    run_trials(study.trials(), tmp_path, fresh(), Spread(1))
    result = study.analyse(Answers(tmp_path))
    assert result.findings[0].verdict == "refuted"
    assert f"below {COLLAPSED:g}" in result.findings[0].sentence
    assert _by_arm(result.tables[0])["mean 2"]["collapsed"] == "no"
    assert result.values["independent_models"] == {"mean 2": None}
    assert any("takes two seeds at least, and was not tested" in note for note in result.notes)
