"""Names that people write in scripts stay where they are and take what they took."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

import vit_cls
from vit_cls.data.transforms import eval_reader, eval_transform, keyed, train_reader, train_transform
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import save_classifier

STABLE = {
    "vit_cls": (
        *("create_model", "load", "__version__"),
        *("ImageClassifier", "ClassificationTask", "ImageDataModule"),
    ),
    "vit_cls.data.decode": ("decode_image",),
    "vit_cls.data.transforms": ("train_transform", "eval_transform", "train_reader", "eval_reader", "keyed"),
    "vit_cls.model.classifier": ("ImageClassifier", "Preprocess"),
    "vit_cls.training.task": ("ClassificationTask",),
    "vit_cls.data.datamodule": ("ImageDataModule",),
}
ARGUMENTS = {
    "vit_cls.data.decode.decode_image": ("data",),
    "vit_cls.data.transforms.train_transform": ("size",),
    "vit_cls.data.transforms.eval_transform": ("size", "crop_pct"),
    "vit_cls.data.transforms.train_reader": ("size", "augment"),
    "vit_cls.data.transforms.eval_reader": ("size", "crop_pct"),
    "vit_cls.create_model": ("name", "num_classes", "pool", "pretrained"),
    "vit_cls.load": ("model",),
    "vit_cls.model.classifier.ImageClassifier": ("model", "preprocess", "class_names"),
}
MODEL = ("patch_embed", "embed_tokens", "encode", "forward_features", "load_report", "state_dict")


@pytest.mark.parametrize(("module", "names"), STABLE.items())
def test_public_names_are_there(module, names):
    assert all(hasattr(importlib.import_module(module), name) for name in names)


@pytest.mark.parametrize(("path", "names"), ARGUMENTS.items())
def test_public_functions_take_what_they_took(path, names):
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert set(names) <= set(parameters)


def test_a_model_and_a_classifier_have_what_scripts_read(tiny, tmp_path):
    model = vit_cls.create_model("vit_pico_patch7_28", num_classes=2, **tiny)
    assert all(hasattr(model, name) for name in MODEL)
    preprocess = Preprocess(model.config.image_hw)
    classifier = vit_cls.load(
        save_classifier(ImageClassifier(model, preprocess, ["a", "b"]), tmp_path / "model.safetensors")
    )
    assert (classifier.class_names, classifier.preprocess) == (["a", "b"], preprocess)
    assert classifier(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 2)


def test_a_transform_is_what_its_reader_does_after_decoding():
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    exact = eval_transform((16, 24), crop_pct=0.8, interpolation="bilinear", exact=True)
    reader = eval_reader((16, 24), crop_pct=0.8, interpolation="bilinear", exact=True)
    assert torch.equal(exact(image), reader(image))
    drawn = keyed(train_transform(16, augment="randaugment"), image, 7)
    assert torch.equal(drawn, train_reader(16, augment="randaugment")(image, 7))
