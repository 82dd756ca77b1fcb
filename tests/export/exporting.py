"""Classifiers to export, images for them, and timm's own opening of a folder."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.models import make_vit, perturbed
from vit_cls.model.classifier import ImageClassifier, Preprocess

NAMES = ["wasp", "bee", "ant", "fly", "moth"]  # out of alphabetical order on purpose


def classifier_of(model: nn.Module) -> ImageClassifier:
    """Every parameter off its initial value, every setting of the preprocessing off its usual one."""
    config = perturbed(model).config
    mean, std = (0.1, 0.2, 0.3, 0.4)[: config.in_chans], (0.5, 0.6, 0.7, 0.8)[: config.in_chans]
    preprocess = Preprocess(config.image_hw, mean, std, 0.8, "squash", "bilinear")
    classifier = ImageClassifier(model, preprocess, NAMES[: config.num_classes])
    classifier.weights_licence = "cc-by-4.0"
    return classifier


def native_classifier(tiny, **settings) -> ImageClassifier:
    return classifier_of(make_vit(tiny, **settings))


def random_images(classifier: ImageClassifier) -> Tensor:
    config = classifier.model.config
    return torch.randn(2, config.in_chans, *config.image_hw, generator=torch.Generator().manual_seed(1))


def opened_by_timm(folder: Path) -> nn.Module:
    """timm opens it; that it does so strictly is seen from the keys."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.state_dict().keys() == load_file(folder / "model.safetensors").keys()
    return model
