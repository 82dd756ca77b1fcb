"""Export of the poolings and orders that timm has, and refusal of those that it lacks."""

from __future__ import annotations

import os

import pytest
import timm
import torch

from vit_cls import create_model, load
from vit_cls.errors import ConfigError
from vit_cls.export.timm import export_timm
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import POOLINGS, pool_names
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.timm_models import NORM_AFTER, POOLS, native_config, skeleton

SPECS = [*(name.replace(":K", ":2") for name in pool_names()), "cls+gap", "gem+last:2+token:1"]


def _classifier(model) -> ImageClassifier:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    names = [f"class_{i}" for i in range(model.config.num_classes)]
    return ImageClassifier(model.eval(), Preprocess(model.config.image_hw), names)


def _native(tiny, **settings) -> ImageClassifier:
    return _classifier(VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": 5, **settings})))


@torch.inference_mode()
@pytest.mark.parametrize(
    "settings",
    [
        {"pool": "avgmax"},
        {"pool": "avgmax", "fc_norm": False},
        {"pool": "avgmax", "reg_tokens": 2, "class_token": False},
        {"class_position": "last"},
    ],
    ids=str,
)
def test_a_model_that_timm_can_be_comes_back_the_same(settings, tiny, generator, tmp_path):
    classifier = _native(tiny, **settings)
    export_timm(classifier, tmp_path / "out")
    images = torch.randn(2, 3, 16, 16, generator=generator)
    logits = classifier.model(images)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert theirs.global_pool == {"avgmax": "avgmax"}.get(settings.get("pool"), "token")
    torch.testing.assert_close(theirs(images), logits, rtol=1e-4, atol=1e-5)
    again = load(tmp_path / "out").model
    assert (again.config.pool, again.config.fc_norm) == (settings.get("pool", "cls"), settings.get("fc_norm"))
    torch.testing.assert_close(again(images), logits, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_an_adapted_model_with_avgmax_opens_in_timm(generator, tmp_path):
    settings = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    classifier = _classifier(create_model("vit_small_patch16_dinov3", pool="avgmax", **settings))
    export_timm(classifier, tmp_path / "out")
    images = torch.randn(2, 3, 32, 32, generator=generator)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert theirs.global_pool == "avgmax"
    torch.testing.assert_close(theirs(images), classifier.model(images), rtol=1e-4, atol=1e-5)


def test_the_norm_stands_after_those_poolings_where_it_does_in_timm():
    assert set(POOLS.values()) <= set(POOLINGS)
    for theirs, ours in POOLS.items():
        config = native_config(skeleton("vit_tiny_patch16_224", global_pool=theirs))
        assert config.pool == ours
        assert config.fc_norm is None  # what the name implies
        assert POOLINGS[ours].norm_after == (ours in NORM_AFTER)


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_causal_attention_is_refused_by_name(position, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"no counterpart of model.causal true.*--format safetensors"):
        export_timm(_native(tiny, causal=True, class_position=position), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in POOLS.values()])
def test_every_pooling_that_timm_lacks_is_refused_by_name(spec, tiny, tmp_path):
    with pytest.raises(
        ConfigError, match=r"timm has no counterpart of model.pool .*; it knows cls, gap, max"
    ):
        export_timm(_native(tiny, pool=spec), tmp_path / "out")
    assert os.listdir(tmp_path) == []
