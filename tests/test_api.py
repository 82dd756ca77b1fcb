"""What `vit_cls.load` returns labels files like the commands do, and leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vit_cls
from vit_cls.errors import ConfigError, ImageError, ModelFileError
from vit_cls.evaluation.predictions import predict_batches
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.bundle import save_classifier


@pytest.fixture
def plain(tiny) -> ImageClassifier:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": 3}))
    preprocess = Preprocess((16, 16), crop_pct=0.8, background=(9, 200, 30))
    return ImageClassifier(model, preprocess, ["blue", "green", "red"], temperature=2.0)


@pytest.fixture
def loaded(plain, tmp_path) -> vit_cls.api.Classifier:
    return vit_cls.load(save_classifier(plain, tmp_path / "model.safetensors"))


@pytest.fixture
def paths(image_root) -> list[str]:
    return sorted(map(str, (image_root / "train").rglob("*.png")))


def test_a_loaded_classifier_labels_files_as_the_commands_do(plain, loaded, paths):
    assert isinstance(loaded, ImageClassifier)
    labels, probs = loaded.predict(paths, batch_size=5)
    config = InferenceConfig("cpu", "32", batch_size=5, num_workers=0)
    rows = [row for batch in predict_batches(plain, paths, config=config) for row in batch]
    assert labels == [row.best[0][0] for row in rows]
    assert probs.dtype == torch.float64
    np.testing.assert_array_equal(probs.max(dim=1).values, [row.best[0][1] for row in rows])
    assert loaded.predict(iter(paths)).labels == labels
    assert loaded.predict([]).labels == []
    assert loaded.predict([]).probs.shape == (0, 3)


def test_a_file_that_cannot_be_read_is_named_and_a_single_path_is_refused(loaded, paths, tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty.png cannot be read: the file is empty."):
        loaded.predict([*paths[:1], tmp_path / "empty.png"])
    with pytest.raises(ConfigError, match="must be a list"):
        loaded.predict(paths[0])
    with pytest.raises(ConfigError, match="batch_size must be at least 1; got 0"):
        loaded.predict(paths, batch_size=0)


def test_predicting_leaves_the_mode_of_the_model_as_it_was(loaded, paths, tmp_path):
    assert not loaded.training
    loaded.train()
    loaded.predict(paths[:2])
    assert loaded.training
    with pytest.raises(ImageError):
        loaded.predict([tmp_path / "gone.png"])
    assert loaded.training


def test_a_model_that_diverged_is_refused(loaded, paths):
    torch.nn.init.constant_(loaded.model.head.bias, float("nan"))
    with pytest.raises(ModelFileError, match=r"not finite for .*0.png"):
        loaded.predict(paths[:3])
