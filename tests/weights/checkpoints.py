"""A tiny checkpoint of ours, to be loaded into other architectures."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models import make_vit, perturbed
from vit_cls import create_model
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import save_classifier

NAME = "vit_tiny_patch16_224"
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}


class Checkpoint:
    """A perturbed tiny model, and the file that holds its weights alone."""

    def __init__(self, folder, **settings):
        self.settings = {**TINY, "num_classes": 5, **settings}
        self.model = perturbed(make_vit(self.settings), torch.Generator().manual_seed(3), 0.3)
        self.path = folder / "weights.safetensors"
        save_file(self.model.state_dict(), self.path)

    def load(self, **changes):
        """The weights in another architecture."""
        settings = {**self.settings, **changes}
        if "class_names" in changes:
            settings.pop("num_classes")
        return create_model(NAME, pretrained=self.path, **settings).eval()

    def own_file(self, names: str = "abcde") -> Path:
        """The same weights as a file of ours, with its architecture."""
        classifier = ImageClassifier(self.model, Preprocess((16, 16)), list(names))
        return save_classifier(classifier, self.path.with_name("model.safetensors"))


def assert_close(first, second, atol=1e-5):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=atol)
