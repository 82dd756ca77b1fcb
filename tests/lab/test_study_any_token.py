"""``study any-token`` on models that see one patch alone, where every answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.any_token import AnyTokenStudy, overall
from vit_cls.lab.studies.patch_tokens import FrozenReads, chosen_patches, frozen_claims, grid_of
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import MODEL, Spread, TrialData, run_trials
from vit_cls.stats.verdicts import judge_all
from vit_cls.training.trial import train_trial
from vit_cls.weights.bundle import MODEL_FILE, save_classifier

TOKENS = ("cls", "first", "corner", "centre", "token:1", "gap")
RECIPE = Recipe(patch_size=4, epochs=7, lr=8e-3, warmup_epochs=3.5)


@pytest.fixture
def finished(quarters, quarter_classifier, tmp_path, monkeypatch):
    """A function to the answer of a study on models that see one patch alone, and what was to be trained."""
    parts = quarters((8, 8), (4, 4), (60, 60))
    monkeypatch.setattr(TrialData, "parts", lambda self, seed: parts)

    def run(**options):
        asked = []

        def train(run_dir, train, val, *, origin, seed, loader, **settings):
            asked.append({"seed": seed, **settings})
            pool, class_token = (settings["model"].get(key, True) for key in ("pool", "class_token"))
            classifier = quarter_classifier(
                lambda model: model.head.bias[1].fill_(0.001),  # where nothing is seen, all is white
                depth=1, final_norm=False, pool=pool, class_token=class_token,
            )  # fmt: skip
            run_dir.mkdir(parents=True, exist_ok=True)
            return save_classifier(classifier, run_dir / MODEL_FILE)

        study = AnyTokenStudy(Setup("digits", tmp_path, seeds=2, margin=0.1, recipe=RECIPE), **options)
        assert run_trials(study.trials(), tmp_path, train, Spread()) == 0
        return study.analyse(Answers(tmp_path)), asked

    return run


def test_only_the_patch_that_holds_the_class_differs_from_a_class_token_that_sees_nothing(finished):
    result, _ = finished(tokens=TOKENS, modes=("scratch",))
    found = {one.claim.split("read at the ")[1].split(" patch")[0]: one for one in result.findings}
    assert {name: one.verdict for name, one in found.items()} == {
        "first": "equivalent",
        "corner": "equivalent",
        "token:1": "refuted",
    }
    assert found["token:1"].estimate == 0.5
    assert result.headline.startswith(
        "Refuted: trained to be read there, 3 patches are +0.0 to +50.0 points from the class token "
        "(the same: 2, not the same: 1, within 10 points; 2 seeds, 120 images)."
    )
    top1 = {name: rows.tolist() for name, rows in result.values["top1"]["scratch"].items()}
    half, full = [0.5, 0.5], [1.0, 1.0]
    assert top1 == {"cls": half, "first": half, "corner": half, "token:1": full, "gap": full}
    assert any("Left out: centre is patch 0 of 2x2, as first is." in note for note in result.notes)


def test_a_training_without_a_class_token_is_asked_for_where_none_is_read(finished):
    _, asked = finished(tokens=("cls", "token:1", "gap"), modes=("scratch",))
    read = {(one["model"]["pool"], one["model"].get("class_token")) for one in asked}
    assert read == {("cls", None), ("token:1", False), ("gap", False)}
    assert [one["seed"] for one in asked] == [0, 1] * 3


def test_fine_tuning_goes_on_from_the_cls_model_of_its_seed_for_a_shorter_time(finished, tmp_path):
    result, asked = finished(tokens=("cls", "token:1"), modes=("finetuned",))
    later = [one for one in asked if "pretrained" in one["model"]]
    starts = AnyTokenStudy(
        Setup("digits", tmp_path, seeds=2, recipe=RECIPE), tokens=("cls", "token:1"), modes=("finetuned",)
    ).scratch()["cls"]
    files = {trial.seed: str(tmp_path / "trials" / trial.key / MODEL) for trial in starts}
    assert len(later) == 4
    assert len(asked) == 6
    for one in later:
        assert one["model"]["pretrained"] == files[one["seed"]]
        assert one["model"]["name"] == "auto"
        assert one["epochs"] == 2
        assert one["optim"]["lr"] == pytest.approx(2e-3)
        assert one["optim"]["warmup_epochs"] == pytest.approx(1.0)
    assert {one["model"]["pool"] for one in later} == {"cls", "token:1"}
    assert [one.verdict for one in result.findings] == ["refuted"]
    assert result.headline.startswith("Refuted: fine-tuned to be read there, one patch is +50.0 points")
    assert [one.title for one in result.tables] == ["Fine-tuned from the CLS-trained model"]


def test_frozen_patches_lie_on_the_map_where_they_lie_in_the_image(finished):
    result, asked = finished(modes=("frozen",))
    assert {one["model"]["pool"] for one in asked} == {"cls", "gap"}
    cls, gap = result.figures
    assert cls.values == gap.values == [[0.5, 1.0], [0.5, 0.5]]
    assert cls.limits == gap.limits == (0.5, 1.0)
    assert "cls 50.0 %, gap 100.0 %" in cls.note
    assert "cls" not in gap.note.partition("comparison:")[2]
    assert result.values["frozen"]["CLS-trained"]["single"].tolist() == [0.625, 0.625]
    assert [one.estimate for one in result.findings] == pytest.approx([-0.125, 0.375, -0.5])
    assert [one.verdict for one in result.findings] == ["refuted"] * 3
    assert result.headline == (
        "Refuted: frozen, the class token is -12.5 points from the average single patch of the CLS-trained "
        "model, and the mean of the patches +37.5 points in the GAP-trained one."
    )


def test_frozen_models_of_photos_trained_from_scratch_are_said_to_norm_behind_the_mean(image_root, tmp_path):
    recipe = Recipe(epochs=1, depth=1, embed_dim=8, num_heads=1, img_size=16, patch_size=8)
    study = AnyTokenStudy(Setup(str(image_root), tmp_path, seeds=1, recipe=recipe), modes=("frozen",))
    assert run_trials(study.trials(), tmp_path, train_trial, Spread()) == 0
    result = study.analyse(Answers(tmp_path))
    assert len(result.findings) == 3
    assert "has its final norm behind the pooling, as in timm" in " ".join(result.notes)


def test_claims_about_frozen_patches_are_supported_where_they_hold():
    rng = np.random.default_rng(0)

    def reads(name: str, way: str, pooled: float, single: float) -> FrozenReads:
        patches = rng.random((3, 16, 4000)) < single
        return FrozenReads(name, (0, 1, 2), (4, 4), patches, {way: rng.random((3, 4000)) < pooled}, {})

    cls, gap = reads("CLS-trained", "cls", 0.95, 0.80), reads("GAP-trained", "gap", 0.94, 0.94)
    found = judge_all(frozen_claims(cls, gap, margin=0.01), seed=0)
    assert [one.verdict for one in found] == ["supported", "equivalent", "supported"]
    same = judge_all(frozen_claims(gap_as_cls(gap), gap, margin=0.01), seed=0)
    assert same[0].verdict in ("equivalent", "cannot tell")
    assert same[2].verdict != "supported"


def gap_as_cls(gap: FrozenReads) -> FrozenReads:
    """The same numbers, as those of the other model."""
    return FrozenReads("CLS-trained", gap.seeds, gap.grid_size, gap.patches, {"cls": gap.pooled["gap"]}, {})


def test_all_modes_together_give_every_claim_table_and_figure_once(finished):
    result, asked = finished(tokens=("cls", "first", "token:1"))
    assert len(asked) == 2 * (3 + 1 + 3)  # gap is trained for the frozen mode
    assert len(result.findings) == 2 + 2 + 3
    assert [type(one).__name__ for one in result.figures] == ["ForestChart"] * 2 + ["HeatMap"] * 2
    assert len(result.tables) == 3
    kept = json.loads(json.dumps(result.to_dict(predictions=True)))["predictions"]
    targets = np.array(kept["targets"])
    for arm, share in (("cls", 0.5), ("token:1", 1.0), ("finetuned token:1", 1.0)):
        preds = np.array([kept["predictions"][arm][seed] for seed in ("0", "1")])
        assert (preds == targets).mean() == share, arm
    patches_right = np.array(kept["frozen"]["GAP-trained"]["patches_right"]["1"])
    assert patches_right.mean() == 4 * 0.625
    assert result.settings["patches"] == {"first": 0, "token:1": 1}


def test_the_random_patch_is_one_of_the_others_and_the_same_for_all_seeds(tmp_path):
    drawn = {
        seed: chosen_patches(["first", "corner", "centre", "random"], (4, 4), seed)[0]["random"]
        for seed in range(40)
    }
    assert set(drawn.values()) == set(range(16)) - {0, 5, 15}
    study = AnyTokenStudy(Setup("digits", tmp_path, seeds=3, seed=7))
    pools = {trial.model["pool"] for trial in study.scratch()["random"]}
    assert pools == {f"token:{drawn[7]}"}


def test_named_patches_of_a_grid_without_room_coincide_and_are_left_out():
    found, left_out = chosen_patches(["first", "corner", "centre", "random", "token:0"], (1, 1), 0)
    assert found == {"first": 0}
    assert [one.split()[0] for one in left_out] == ["corner", "centre", "random", "token:0"]
    assert chosen_patches(["centre"], (3, 5), 0)[0] == {"centre": 7}


def test_the_grid_is_that_of_the_recipe():
    assert grid_of(Recipe().resolved("digits")) == (4, 4)
    assert grid_of(Recipe(name="vit_tiny_patch16_224", img_size=96, patch_size=8).resolved("x")) == (12, 12)


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        (["equivalent", "equivalent"], "equivalent"),
        (["equivalent", "cannot tell"], "cannot tell"),
        (["cannot tell", "refuted"], "refuted"),
    ],
)
def test_one_patch_that_is_not_the_same_refutes_all(verdicts, wanted):
    from vit_cls.stats.verdicts import Finding

    assert overall([Finding("", verdict, "") for verdict in verdicts]) == wanted


def test_fit_takes_the_settings_of_every_kind_of_training(tmp_path):
    recipe = Recipe(epochs=1, depth=1, embed_dim=8, num_heads=1, batch_size=256)
    setup = Setup("digits", tmp_path, seeds=1, recipe=recipe)
    study = AnyTokenStudy(setup, tokens=("cls", "centre"))
    assert run_trials(study.trials(), tmp_path, train_trial, Spread()) == 0
    answers = Answers(tmp_path)
    assert {trial.key: answers.failed(trial) for trial in study.trials() if answers.failed(trial)} == {}
    centre, tuned = study.scratch()["centre"][0], study.finetuned()["centre"][0]
    assert not answers.model(centre).model.config.class_token
    assert answers.model(tuned).model.config.class_token
    assert answers.model(tuned).model.config.pool == "token:5"
    assert study.analyse(answers).headline
