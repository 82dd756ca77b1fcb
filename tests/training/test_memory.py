"""Options that save memory: checkpointed blocks, and the hint that a smaller image would do."""

from __future__ import annotations

import logging

import pytest

from tests.training.runs import fit_tiny, same_weights, weights_of
from vit_cls import create_model
from vit_cls.cli import main
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.training import runs
from vit_cls.training.options import ModelOptions
from vit_cls.training.runs import size_hint

HINT = "pixels are the model's own size"


def test_a_checkpointed_run_ends_in_the_same_weights(image_root, tmp_path):
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        model = {"grad_checkpointing": checkpointing, "proj_drop_rate": 0.1}
        fit_tiny(image_root, tmp_path / name, epochs=1, model=model)
    assert same_weights(weights_of(tmp_path / "plain"), weights_of(tmp_path / "checkpointed"))


def test_the_option_reaches_native_and_adapted_models():
    small = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 32}
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3"):
        for checkpointing in (False, True):
            options = ModelOptions(name, grad_checkpointing=checkpointing, **small)
            assert options.build(["a", "b"]).model.grad_checkpointing is checkpointing


def test_checkpointing_without_a_block_that_is_trained_is_refused(image_root, capsys, tmp_path):
    words = ["--model.grad_checkpointing=true", "--optim.freeze=backbone", f"--run_dir={tmp_path / 'run'}"]
    assert main(["fit", f"--data.root={image_root}", *words]) == 2
    assert "model.grad_checkpointing has no effect with optim.freeze backbone" in capsys.readouterr().err


def _classifier(name: str, **settings) -> ImageClassifier:
    model = create_model(name, depth=1, embed_dim=24, num_heads=2, num_classes=2, **settings)
    return ImageClassifier(model, Preprocess(model.config.image_hw), ["a", "b"])


def test_a_size_far_above_224_pixels_is_told_with_what_224_would_save():
    hint = size_hint(_classifier("vit_small_patch14_dinov2"))
    assert hint is not None
    assert "518 x 518 pixels are the model's own size, and make 1,369 patches of an image" in hint
    assert "--model.img_size 224 would make 256, 5.3 times fewer" in hint
    assert size_hint(_classifier("vit_small_patch14_dinov2", img_size=224)) is None
    assert size_hint(_classifier("vit_base_patch16_384")) is None


@pytest.mark.parametrize("given", [False, True])
def test_the_hint_is_for_who_did_not_choose_the_size(given, image_root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(runs, "USUAL_SIZE", 14)  # a quarter of the patches of 28 pixels
    model = {"img_size": 28 if given else None, "patch_size": 7}
    with caplog.at_level(logging.INFO, "vit_cls"):
        fit_tiny(image_root, tmp_path / "run", epochs=1, model=model, trainer={"limit_train_batches": 1})
    assert (HINT in caplog.text) is not given
    assert ("--model.img_size 14 would make 4, 4.0 times fewer" in caplog.text) is not given
