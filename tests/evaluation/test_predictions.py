"""Every image once, the same answer for any batch size, failures as rows."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.models import tiny_classifier
from vit_cls.data.decode import decode_image
from vit_cls.data.transforms import eval_reader
from vit_cls.errors import DataError, ModelFileError
from vit_cls.evaluation.predictions import (
    Scoring,
    canonical_classes,
    images_for_model,
    predict_index,
)
from vit_cls.evaluation.results import evaluate_predictions, tables
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import Preprocess
from vit_cls.weights.bundle import load_classifier, save_classifier


def _config(**settings) -> InferenceConfig:
    return InferenceConfig("cpu", **{"num_workers": 0, **settings})


def test_predictions_are_the_classifiers_on_each_decoded_and_cropped_image(image_root):
    classifier = tiny_classifier()
    source = images_for_model(image_root / "val", classifier).source
    predictions = predict_index(classifier, source, _config(batch_size=3))
    transform = eval_reader(16, crop_pct=0.8)
    images = torch.stack(
        [transform(decode_image(source.index.path(i).read_bytes())) for i in range(len(source.index))]
    )
    with torch.inference_mode():
        expected = classifier(images).softmax(dim=1).numpy()
    np.testing.assert_allclose(predictions.probs, expected, atol=1e-6)
    assert predictions.errors == {}


def test_an_unreadable_file_is_a_row_with_its_reason(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "test")
    (tmp_path / "test/blue/1.png").write_bytes(b"")
    classifier = tiny_classifier()
    source = images_for_model(tmp_path / "test", classifier).source
    predictions = predict_index(classifier, source, _config(batch_size=2))
    clean = predict_index(
        classifier, images_for_model(image_root / "val", classifier).source, _config(batch_size=8)
    )
    assert predictions.errors == {1: "the file is empty"}
    others = [i for i in range(8) if i != 1]
    np.testing.assert_allclose(predictions.probs[others], clean.probs[others], atol=1e-6)
    written = dict(tables(predictions, evaluate_predictions(predictions)))
    rows = list(csv.DictReader(written["predictions.csv"].splitlines()))
    assert [row["path"] for row in rows] == list(predictions.index.paths)
    empty = dict.fromkeys(("prediction", "probability", "correct"), "")
    assert rows[1] == {"path": "blue/1.png", "label": "blue", "error": "the file is empty"} | empty
    correct = sum(int(row["correct"]) for row in rows if row["correct"])
    assert correct == evaluate_predictions(predictions).correct
    per_class = csv.DictReader(written["per_class.csv"].splitlines())
    assert [row["class"] for row in per_class] == ["blue", "red"]


def test_classes_are_matched_by_name_not_by_position(image_root):
    few = images_for_model(
        image_root / "val", tiny_classifier(("amber", "blue", "green", "red"))
    ).source.index
    assert sorted(set(few.labels.tolist())) == [1, 3]
    assert few.class_names == ["amber", "blue", "green", "red"]
    with pytest.raises(
        DataError, match=r"1 class\(es\) that are not known: red.*blue, red.*Known classes: blue, green"
    ):
        images_for_model(image_root / "val", tiny_classifier(("blue", "green")))


def test_a_folder_with_one_of_the_models_classes_is_scored(image_root, tmp_path):
    shutil.copytree(image_root / "val/red", tmp_path / "red")
    classifier = tiny_classifier()
    predictions = predict_index(classifier, images_for_model(tmp_path, classifier).source, _config())
    result = evaluate_predictions(predictions)
    assert (result.images, result.classes_present) == (4, 1)


def test_of_a_folder_of_parts_one_is_taken_and_named(image_root):
    chosen = images_for_model(image_root, tiny_classifier())
    assert (chosen.split, chosen.origin) == ("val", str(image_root / "val"))
    chosen = images_for_model(image_root, tiny_classifier(), split="Training")
    assert (chosen.split, chosen.source.index.root) == ("train", image_root / "train")


def test_a_label_of_a_manifest_that_the_model_lacks_is_refused_by_the_name_of_the_table(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "m.csv").write_text("path,label,split\na.png,plaid,test\n")
    with pytest.raises(DataError, match=r"^the test rows of .*m\.csv has 1 class.* not known: plaid\."):
        images_for_model(tmp_path / "m.csv", tiny_classifier())


def test_the_embedded_digits_are_scored_without_any_file():
    classifier = tiny_classifier([str(i) for i in range(10)])
    chosen = images_for_model("digits", classifier)
    predictions = predict_index(classifier, chosen.source, _config())
    assert (chosen.split, chosen.origin) == ("test", "the held-out third of the embedded digits")
    assert np.isfinite(predictions.probs).all()
    assert len(predictions.index) == 599


def test_bf16_is_close_to_fp32(image_root):
    classifier = tiny_classifier()
    source = images_for_model(image_root / "val", classifier).source
    full = predict_index(classifier, source, _config(precision="32"))
    low = predict_index(classifier, source, _config(precision="bf16"))
    difference = np.abs(full.probs - low.probs).max()
    assert 0 < difference < 0.02


def test_the_models_own_colour_shows_through_transparent_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("blue", "red"):
        (tmp_path / "test" / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (20, 20, 4), dtype=np.uint8)
        pixels[:10, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / "test" / name / "1.png")
    results = []
    for background in ((255, 255, 255), (0, 0, 0)):
        preprocess = Preprocess((16, 16), background=background)
        path = save_classifier(tiny_classifier(preprocess=preprocess), tmp_path / "model.safetensors")
        classifier = load_classifier(path)
        assert classifier.preprocess.background == background
        source = images_for_model(tmp_path / "test", classifier).source
        results.append(predict_index(classifier, source, _config()).probs)
    assert np.abs(results[0] - results[1]).max() > 1e-4


def test_exact_pixels_are_close_to_the_fast_ones_and_not_the_same(image_root):
    classifier = tiny_classifier(preprocess=Preprocess((16, 16), crop_pct=1.0))
    source = images_for_model(image_root / "val", classifier).source
    fast, exact = (predict_index(classifier, source, _config(exact=exact)).probs for exact in (False, True))
    assert 0 < np.abs(fast - exact).max() < 0.02


def test_a_model_without_a_head_says_how_to_train_one(image_root):
    source = images_for_model(image_root / "val", tiny_classifier()).source
    with pytest.raises(ModelFileError, match=r"no head.*configs/linear_probe.yaml"):
        predict_index(tiny_classifier(()), source, _config())


def test_folders_of_imagenet_classes_are_known_by_id_and_by_name_in_any_spelling():
    model = ["n01440764", "n01443537", "other"]
    folders = ["Tinca_tinca", "n01443537", "other", "stranger"]
    assert canonical_classes(folders, model, name="photos") == [*model, "stranger"]
    assert canonical_classes(["tench"], ["tench"], name="photos") == ["tench"]


def test_the_temperature_divides_the_logits_and_changes_no_prediction(image_root):
    classifier = tiny_classifier()
    source = images_for_model(image_root / "val", classifier).source
    for tta in ("none", "flip"):
        classifier.temperature = 1.0
        plain = predict_index(classifier, source, _config(), tta=tta)
        classifier.temperature = 0.5
        sharp = predict_index(classifier, source, _config(), tta=tta)
        expected = plain.probs**2 / (plain.probs**2).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(sharp.probs, expected, atol=1e-6)
        assert (sharp.probs.argmax(axis=1) == plain.probs.argmax(axis=1)).all()
        assert sharp.scoring == Scoring(temperature=0.5, tta=tta, device="cpu", precision="32")


def test_restricting_shares_the_probability_among_the_classes_of_the_folder(image_root):
    classifier = tiny_classifier(("amber", "blue", "green", "red"))
    source = images_for_model(image_root / "val", classifier).source
    free = predict_index(classifier, source, _config()).probs
    bound = predict_index(classifier, source, _config(), restrict=True)
    assert (bound.probs[:, [0, 2]] == 0).all()
    expected = free[:, [1, 3]] / free[:, [1, 3]].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(bound.probs[:, [1, 3]], expected, atol=1e-6)
    assert bound.scoring.restricted
