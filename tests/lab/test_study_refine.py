"""``study refine`` on a model whose class token learns the class in its second block, and nowhere else."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from vit_cls import create_model
from vit_cls.commands import study as command
from vit_cls.errors import ConfigError, DataError, ModelFileError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.refine import RefineStudy, headline
from vit_cls.lab.studies.refinement import refinement
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import Spread, TrialData, run_trials
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.stats.verdicts import Finding
from vit_cls.weights.bundle import save_classifier

PER_CLASS = (8, 8), (4, 4), (40, 40)
"""Images of each class in each part."""


@pytest.fixture(scope="module")
def gathering(quarter_classifier):
    """A function to a model: every token takes up the mean of all in block 2; blocks 1 and 3 do nothing."""

    def gather(model):
        for norm in [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]:
            norm.weight.fill_(1)
        attn = model.blocks[1].attn
        attn.qkv.weight[4:] = torch.eye(2)  # values; queries and keys of zero weigh all tokens alike
        attn.proj.weight.copy_(torch.eye(2))

    return partial(quarter_classifier, gather, depth=3, norm_eps=1.0)


@pytest.fixture(scope="module")
def parts(quarters):
    return quarters(*PER_CLASS)


@pytest.fixture(scope="module")
def train_nothing(gathering):
    """Saves the model above in the place of a trained one."""

    def train(run_dir, *args, **settings):
        run_dir.mkdir(parents=True, exist_ok=True)
        return save_classifier(gathering(), run_dir / "model.safetensors")

    return train


@pytest.fixture
def images(parts, monkeypatch):
    """The images above are those of every study."""
    monkeypatch.setattr(TrialData, "parts", lambda self, seed: parts)


@pytest.fixture(scope="module")
def result(parts, train_nothing, tmp_path_factory):
    """The answer of three seeds."""
    study = RefineStudy(Setup("digits", tmp_path_factory.mktemp("study"), seeds=3), permutations=5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(TrialData, "parts", lambda self, seed: parts)
        assert run_trials(study.trials(), study.setup.folder, train_nothing, Spread()) == 0
        return study.analyse(Answers(study.setup.folder))


@pytest.fixture
def model_file(gathering, tmp_path):
    return str(save_classifier(gathering(), tmp_path / "model.safetensors"))


def test_the_block_that_gathers_the_class_is_the_first_whose_class_token_is_used(result):
    assert [one.verdict for one in result.findings] == ["equivalent", "supported", "supported"]
    assert result.values["first_used_layer"] == 2
    assert result.headline.startswith(
        "Supported: the class token is used from block 2 of 3 on, and not before: a class token shuffled "
    )
    assert "A ridge probe reads 100.0 % off it there, and 50.0 % one block earlier." in result.headline
    assert result.values["top1"].tolist() == [1.0, 1.0, 1.0]
    assert result.findings[0].counts == {"seeds": 3, "images": 80}


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (
            ["supported", "supported"],
            "Supported: what the class token holds after the first block of 2 is used: ",
        ),
        (
            ["cannot tell", "supported"],
            "block 2 of 2 on at the latest; whether it is before cannot be told: ",
        ),
        (["equivalent", "supported"], "block 2 of 2 on, and not before: "),
        (["equivalent", "cannot tell"], "Cannot tell: sentence 1"),
        (
            ["cannot tell", "supported", "equivalent", "cannot tell", "supported"],
            "Supported: the class token is used after blocks 2 and 5 of 5; after the others no drop was "
            "shown: sentence 1",
        ),
        (["supported", "equivalent"], "the class token is used after block 1 of 2; after the others no drop"),
        (["supported", "refuted", "supported", "supported"], "is used after blocks 1, 3 and 4 of 4; after"),
    ],
)
def test_the_headline_says_no_more_than_the_verdicts(verdicts, words):
    findings = [Finding("", verdict, f"sentence {i}") for i, verdict in enumerate(verdicts)]
    assert words in headline(findings, np.ones((1, len(verdicts) + 1, 4)))


def test_what_is_read_off_replaced_and_inserted_is_what_this_model_must_give(result):
    values = result.values
    for name in ("ridge_probe", "class_lens"):
        assert values[name].tolist() == [0.5, 0.5, 1.0, 1.0], name
    assert values["mean_class_token_instead"].tolist() == [1.0, 1.0, 0.5, 0.5]
    # Before the second block the class token may be missing; after it, it comes too late to learn anything.
    assert values["inserted_here_only"].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert values["kl"][:2].tolist() == [0.0, 0.0]
    assert values["kl"][2] > 0.001


def test_the_mean_class_token_is_that_of_the_training_images(gathering, quarters):
    """Most training images are black and most test images white: the mean of each part would say its own."""
    found = refinement(gathering(), quarters((12, 4), (4, 4), (6, 30)))
    assert found.preds.tolist() == [0] * 6 + [1] * 30
    assert found.replaced[1].tolist() == found.preds.tolist()  # not yet needed
    assert found.replaced[2].tolist() == found.replaced[3].tolist() == [0] * 36


def test_shuffling_changes_nothing_before_the_first_block_and_permutes_logits_after_the_last(result):
    values = result.values
    assert values["shuffle_layer0_max_change"] == 0.0
    assert values["shuffled"][0] == np.mean(values["top1"])
    assert values["shuffled"][3] == pytest.approx(values["permuted_logits_top1"], abs=1e-12)
    assert values["shuffled"][3] < 0.75
    assert values["shuffle_last_layer_max_distance_to_permuted_logits"] < 1e-6


def test_shuffled_accuracy_is_the_share_of_images_that_got_a_token_of_their_own_class(gathering, parts):
    found = refinement(gathering(), parts, seeds=[4], permutations=2)
    rng = np.random.default_rng(4)
    labels = parts.test.index.labels
    same = np.mean([labels[rng.permutation(len(labels))] == labels for _ in range(2)], axis=0)
    assert np.array_equal(found.shuffled[2], same)
    assert np.array_equal(found.permuted, same)
    assert found.shuffled[1].min() == 1.0


def test_batches_of_any_size_see_the_permutation_of_the_whole_test_part(gathering, parts):
    one, many = (
        refinement(gathering(), parts, config=InferenceConfig(precision="32", batch_size=size))
        for size in (80, 7)
    )
    assert np.array_equal(one.shuffled, many.shuffled)
    assert np.array_equal(one.replaced, many.replaced)
    np.testing.assert_allclose(one.kl, many.kl, atol=1e-6)


def test_divergence_is_that_of_the_answers_of_the_two_images(gathering, parts):
    found = refinement(gathering(), parts, permutations=1)
    classifier = gathering()
    with torch.no_grad():
        black, white = classifier.probs(classifier(parts.test.images[[0, 79]]))
    from_black = float((black * (black / white).log()).sum())
    moved = found.kl[3][:40][found.shuffled[3][:40] == 0]
    assert len(moved) > 5
    np.testing.assert_allclose(moved, from_black, rtol=1e-5)


def test_a_model_of_the_user_is_not_trained_and_answers_for_itself(
    images, tmp_path, model_file, train_nothing
):
    study = RefineStudy(Setup("digits", tmp_path / "none", seeds=3), model=model_file, permutations=2)
    assert study.trials() == []
    result = study.analyse(Answers(study.setup.folder))
    assert result.values["first_used_layer"] == 2
    assert result.findings[1].counts == {"seeds": 1, "images": 80}
    assert "this one training" in result.findings[1].sentence
    assert any("6 permutations" in note for note in result.notes)
    assert (
        sum(note.startswith("If the model was trained on images of the train") for note in result.notes) == 1
    )
    assert "recipe" not in result.settings
    assert result.settings["model"] == model_file
    assert (result.data["train"], result.data["val"], result.data["test"]) == (16, 8, 80)


def test_predictions_suffice_to_compute_the_shuffled_accuracy_again(result):
    kept = json.loads(json.dumps(result.to_dict(predictions=True)))["predictions"]
    assert len(kept["paths"]) == len(kept["targets"]) == 80
    share = np.array([kept["shuffled_right_share"][seed] for seed in ("0", "1", "2")])
    np.testing.assert_allclose(share.mean(axis=(0, 2)), result.values["shuffled"])
    ridge = np.array([kept["by_layer"]["ridge"][seed] for seed in ("0", "1", "2")])
    assert ((ridge == kept["targets"]).mean(axis=(0, 2)) == result.values["ridge_probe"]).all()


def test_seeds_draw_other_permutations(gathering, parts):
    first, again, other = (refinement(gathering(), parts, seeds=[seed]).shuffled for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_causal_model_is_shuffled_but_not_deprived_of_its_class_token(gathering, parts):
    classifier = gathering(causal=True, class_position="last")
    found = refinement(classifier, parts)
    assert found.inserted is None
    assert found.shuffled.mean(axis=1).round(1).tolist() == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "late"), [("beit3_base_patch16_224", True), ("eva02_base_patch16_clip_224", False)]
)
def test_identities_hold_for_models_of_timm(name, late, parts):
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 32, "pool": "cls"}
    model = create_model(name, num_classes=2, **small)
    found = refinement(
        ImageClassifier(model, Preprocess((32, 32)), ["black", "white"]), parts, permutations=2
    )
    assert found.layer0_change == 0.0
    assert found.last_change < 1e-5
    assert found.kl[2].max() > 0  # the class token of random weights differs from image to image
    assert (found.inserted is not None) == late
    if late:
        assert np.array_equal(found.inserted[0], found.preds)
        assert len(set(found.inserted[2].tolist())) == 1


def test_a_head_that_reads_patches_is_refused(quarter_classifier, tmp_path):
    file = save_classifier(quarter_classifier(depth=1, pool="gap"), tmp_path / "gap.safetensors")
    study = RefineStudy(Setup("digits", tmp_path / "none"), model=str(file))
    for refused in (study.trials, lambda: study.analyse(Answers(tmp_path))):
        with pytest.raises(ConfigError, match=r"\(pool cls\).*got a model with pool gap"):
            refused()


def test_classes_that_the_model_does_not_have_are_refused(tmp_path, model_file):
    study = RefineStudy(Setup("digits", tmp_path / "none"), model=model_file)
    with pytest.raises(DataError, match="not known"):
        study.analyse(Answers(tmp_path))


def test_a_model_that_is_not_there_is_refused_before_anything_begins(tmp_path):
    with pytest.raises(ModelFileError, match="there is no file or folder 'm'"):
        RefineStudy(Setup("digits", tmp_path), model="m").trials()


def test_the_command_writes_a_report_for_a_model_of_the_user(images, tmp_path, model_file):
    folder = tmp_path / "report"
    words = ["refine", "--data", "digits", "--model", model_file, "--output", str(folder), "--seeds", "1"]
    outcome = command.run(words)
    assert "Supported: the class token is used from block 2 of 3 on, and not before" in outcome.text
    record = json.loads((folder / "results.json").read_text())
    assert record["values"]["shuffle_layer0_max_change"] == 0.0
    assert [one["kind"] for one in record["figures"]] == ["LineChart", "LineChart"]
