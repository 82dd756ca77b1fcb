"""Features of image files are the encoder's tokens, in a file that can be interrupted and resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.evaluation.models import tiny_classifier
from vit_cls.data.transforms import model_reader
from vit_cls.errors import ConfigError
from vit_cls.evaluation.features import feature_chunks, feature_function
from vit_cls.evaluation.predict_files import FeatureFile, RowFile, save_rows
from vit_cls.inference import InferenceConfig, layer_tokens
from vit_cls.signals import Stopped


def _features_into(folder, classifier, what, paths, *, resume=False, stop_after=None):
    compute, shape = feature_function(classifier, what)

    def work(some):
        config = InferenceConfig("cpu", num_workers=0, batch_size=4)
        for number, chunk in enumerate(feature_chunks(classifier, some, compute, shape, config)):
            yield chunk
            if number + 1 == stop_after:
                os.kill(os.getpid(), 2)

    table = RowFile(folder, "features", "csv", ("path", "error"))
    file = FeatureFile(folder / "features.safetensors", shape, {"features": what})
    save_rows(table, iter(paths), work, facts={}, resume=resume, features=file)


@pytest.mark.parametrize("what", ["cls", "gap", "tokens", "cls+gem:3", "last:2+token:4"])
def test_features_are_the_encoders_tokens_and_nan_where_an_image_failed(what, image_root, tmp_path):
    classifier = tiny_classifier(reg_tokens=2)
    paths = [str(path) for path in sorted((image_root / "train").rglob("*.png"))][:9]
    paths.insert(2, "gone.png")
    _features_into(tmp_path / "whole", classifier, what, paths)
    with pytest.raises(Stopped):
        _features_into(tmp_path / "parts", classifier, what, paths, stop_after=1)
    _features_into(tmp_path / "parts", classifier, what, paths, resume=True)
    assert sorted(os.listdir(tmp_path / "parts")) == ["features.csv", "features.safetensors"]
    for name in ("features.csv", "features.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    with safe_open(tmp_path / "whole/features.safetensors", framework="pt") as file:
        features = file.get_tensor("features")
        assert file.metadata()["features"] == what
    assert features.dtype == torch.float32
    assert features[2].isnan().all()
    reader, good = model_reader(classifier.preprocess), [i for i in range(10) if i != 2]
    images = torch.stack([reader(Path(paths[i]).read_bytes()) for i in good])
    with torch.inference_mode():
        tokens = classifier.model.encode(classifier.normalise(images))
        earlier = classifier.model.norm(layer_tokens(classifier, [1])(images)[1])
    gem = tokens[:, 3:].clamp_min(1e-6).pow(3).mean(1).pow(1 / 3)
    expected = {
        "cls": tokens[:, 0],
        "gap": tokens[:, 3:].mean(1),
        "tokens": tokens,
        "cls+gem:3": torch.cat([tokens[:, 0], gem], dim=1),
        "last:2+token:4": torch.cat([earlier[:, 0], tokens[:, 0], tokens[:, 7]], dim=1),
    }[what]
    torch.testing.assert_close(features[good], expected, atol=1e-5, rtol=0)


def test_a_class_token_is_not_invented():
    with pytest.raises(ConfigError, match=r"--features cls reads the class token, .*--features tokens"):
        feature_function(tiny_classifier(class_token=False, pool="gap"), "cls")
