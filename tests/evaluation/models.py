"""The tiny model that the tests of evaluation run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.conftest import TINY
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer


def tiny_classifier(
    names: Sequence[str] = ("blue", "red"), *, preprocess=None, **settings
) -> ImageClassifier:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig.from_dict({**TINY, "num_classes": len(names), **settings}))
    preprocess = preprocess or Preprocess((16, 16), crop_pct=0.8, background=(9, 200, 30))
    return ImageClassifier(model, preprocess, list(names))
