"""``evaluate --exact`` on real photos: timm's own loader and model give the same predictions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageDataset, create_loader, resolve_model_data_config

from tests.models import perturbed
from vit_cls.data.dataset import FolderSource
from vit_cls.data.index import index_folder
from vit_cls.evaluation.predictions import predict_index
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.factory import create_model
from vit_cls.weights.timm_models import preprocess_of, pretrained_config

PHOTOS = Path(os.environ.get("VIT_CLS_TEST_DATA", "../shared/data")) / "clothing_small/test"
TAGS = [
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_siglip_224.webli",
]  # centre crop; squash


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"needs real photos at {PHOTOS} (VIT_CLS_TEST_DATA)")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm's dataset leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tag", TAGS)
def test_exact_evaluation_gives_timms_predictions_on_every_photo(tag):
    torch.manual_seed(0)
    narrow = {"embed_dim": 96, "num_heads": 3, "depth": 2, "num_classes": 10}
    theirs = perturbed(timm.create_model(tag, **narrow))
    data = resolve_model_data_config(theirs)
    photos = ImageDataset(str(PHOTOS))
    loader = create_loader(
        photos,
        input_size=data["input_size"],
        batch_size=32,
        use_prefetcher=False,
        num_workers=0,
        **{key: data[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    with torch.inference_mode():
        probs = torch.cat([theirs(images).softmax(dim=1) for images, _ in loader]).numpy()

    ours = create_model(tag, **narrow)
    ours.load_state_dict(theirs.state_dict())
    index = index_folder(PHOTOS)
    row = {name: i for i, name in enumerate(photos.filenames())}  # timm sorts names in another order
    expected = probs[[row[path] for path in index.paths]]
    classifier = ImageClassifier(ours, preprocess_of(pretrained_config(tag)), index.class_names)
    assert index.class_names == sorted(os.listdir(PHOTOS))
    exact = predict_index(classifier, FolderSource(index), InferenceConfig("cpu", num_workers=0, exact=True))
    assert len(index) == len(expected) >= 372
    assert np.array_equal(exact.probs.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(exact.probs, expected, atol=2e-5)
    fast = predict_index(classifier, FolderSource(index), InferenceConfig("cpu", num_workers=0))
    differ = int((fast.probs.argmax(1) != expected.argmax(1)).sum())
    assert differ <= 8  # seen: none of 372, for both tags
