"""``study when``: what is trained on which mosaics, the slopes, and verdicts where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import Spread, run_trials
from vit_cls.lab.studies.when import WhenStudy


def _study(tmp_path, *, seeds=2, recipe=None, data="digits", margin=0.01, **options) -> WhenStudy:
    recipe = Recipe(epochs=1) if recipe is None else recipe
    return WhenStudy(Setup(data, tmp_path, seeds=seeds, recipe=recipe, margin=margin), **options)


def _shares(levels: dict[str, dict[int, float]], tiles: int = 16) -> dict[str, float]:
    return {f"{head}, {n} of {tiles}": share for head, row in levels.items() for n, share in row.items()}


def test_every_head_is_trained_on_every_share_under_every_seed_with_the_same_canvas(tmp_path):
    study = _study(tmp_path)
    trials = study.trials()
    assert len({trial.key for trial in trials}) == len(trials) == 4 * 4 * 2
    assert study.relevant == [16, 4, 2, 1]
    for trial in trials:
        assert (trial.model["img_size"], trial.model["patch_size"], trial.model["crop_pct"]) == (32, 4, 1.0)
        assert trial.loader["augment"] == "none"
        assert trial.optim["lr"] == study.setup.recipe.lr
        assert trial.data.mosaic["seed"] == study.setup.seed
    assert {trial.model["pool"] for trial in trials} == {"cls", "gap", "max", "map"}
    assert {trial.model.get("class_token") for trial in trials if trial.arm == "gap"} == {False}


def test_photos_get_canvases_of_their_tiles_and_the_patch_of_the_recipe(tmp_path):
    study = _study(tmp_path, data="photos", recipe=Recipe(epochs=1, patch_size=16), side=2, tile=48)
    trial = study.trials()[0]
    assert (trial.model["img_size"], trial.model["patch_size"]) == (96, 16)
    assert study.relevant == [4, 2, 1]
    assert trial.loader["augment"] == "none"
    assert trial.data.mosaic["tile"] == 48


def test_a_head_that_keeps_what_gap_loses_is_supported_and_one_that_loses_more_refuted(tmp_path, answered):
    study = _study(tmp_path, heads=("max", "cls", "map", "gap"), seeds=3, margin=0.05)
    falling = {16: 0.9, 4: 0.8, 2: 0.7, 1: 0.6}
    levels = {
        "gap": falling,
        "max": dict.fromkeys(falling, 0.9),
        "cls": {16: 0.9, 4: 0.65, 2: 0.5, 1: 0.3},
        "map": falling,
    }
    result = study.analyse(answered(study, _shares(levels), images=300))
    verdicts = [finding.verdict for finding in result.findings]
    assert verdicts[:3] == ["supported", "refuted", "equivalent"]
    halvings = np.array([0.0, 2.0, 3.0, 4.0])
    margin_of_slopes = 0.05 / 4  # over the four halvings it is the margin of accuracies
    for finding, head in zip(result.findings, ("max", "cls", "map"), strict=False):
        gains = [levels[head][count] - falling[count] for count in (16, 4, 2, 1)]
        # Shares of 300 images are whole numbers of images.
        assert finding.estimate == pytest.approx(np.polyfit(halvings, gains, 1)[0], abs=1e-9)
        assert finding.margin == pytest.approx(margin_of_slopes)
        assert finding.unit == "points per halving"
        assert finding.counts["images"] == 300
    assert result.headline.startswith("Supported: the slope of max is higher than the slope of gap by")
    assert "Of all heads max loses least on validation" in result.headline
    levels_of_max = result.findings[3:7]
    assert [one.estimate for one in levels_of_max] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [one.verdict for one in levels_of_max] == ["equivalent", *3 * ["supported"]]
    assert len(result.findings) == 3 + 12
    assert result.values["relevant_share"] == [1.0, 0.25, 0.125, 0.0625]
    np.testing.assert_allclose(result.values["top1"]["gap"], [[0.9] * 3, [0.8] * 3, [0.7] * 3, [0.6] * 3])
    forest = result.figures[1].rows
    assert forest[0][1] == pytest.approx(result.findings[0].estimate)


class Chosen(Answers):
    """Answers by whose validation images gap alone does not lose anything."""

    def val_accuracy(self, trials):
        return 0.9 if trials[0].arm == "gap" else 0.1 * int(trials[0].variant.split()[0]) / 16


def test_the_head_that_loses_least_is_chosen_by_the_validation_images(tmp_path, answered):
    study = _study(tmp_path, heads=("max", "gap"), seeds=1)
    levels = {"gap": {16: 0.9, 4: 0.7, 2: 0.6, 1: 0.5}, "max": dict.fromkeys((16, 4, 2, 1), 0.9)}
    answered(study, _shares(levels), images=300)
    result = study.analyse(Chosen(study.setup.folder))
    assert result.headline.endswith(
        "Of all heads gap loses least on validation as the relevant part shrinks; on the test images it is "
        "-10.0 points per halving."
    )


def test_heads_at_chance_are_named_and_failed_files_are_in_the_record(tmp_path, answered):
    study = _study(tmp_path, heads=("gap", "max"), seeds=1)
    levels = {"gap": {16: 0.9, 4: 0.7, 2: 0.5, 1: 0.2}, "max": dict.fromkeys((16, 4, 2, 1), 0.9)}
    result = study.analyse(answered(study, _shares(levels), images=300))
    named = [note for note in result.notes if note.startswith("No better than the commonest class")]
    assert len(named) == 1
    assert named[0].endswith("gap, 1 of 16.")
    assert result.data["failed"] == 0
    assert result.data["classes"] == ["0", "1", "2", "3", "4"]
    assert result.data["test"] == 300


def test_the_curve_of_untrained_models_is_of_canvases_of_their_tiles(tmp_path, fresh):
    def train(run_dir, train, val, **settings):
        assert train.images.shape[1:] == (3, 16, 16)
        return fresh()(run_dir, train, val, **settings)

    study = _study(tmp_path, heads=("gap", "cls"), seeds=1, side=2, distractors="noise")
    assert run_trials(study.trials(), tmp_path, train, Spread(1)) == 0
    result = study.analyse(Answers(tmp_path))
    assert set(result.predictions["predictions"]) == {
        f"{head}, {count} of 4" for head in ("gap", "cls") for count in (4, 2, 1)
    }
    gap = result.figures[0].lines[0]
    assert [x for x, _ in gap.points] == [0.25, 0.5, 1.0]
    preds = np.array(result.predictions["predictions"]["gap, 1 of 4"]["0"])
    assert gap.points[0][1] == pytest.approx(np.mean(preds == result.predictions["targets"]))
