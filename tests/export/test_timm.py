"""Export: the folder opens in timm strictly, computes the same, and comes back as the same classifier."""

from __future__ import annotations

import os
import re

import pytest
import timm
import torch
from safetensors import SafetensorError

from tests.export.exporting import classifier_of, native_classifier, opened_by_timm, random_images
from tests.models import POOLS, relative_difference
from vit_cls import create_model, load
from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.export.timm import export_timm
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.pooling import POOLINGS
from vit_cls.weights.timm_models import NORM_AFTER, native_config, skeleton
from vit_cls.weights.timm_models import POOLS as TIMM_POOLS

pytestmark = pytest.mark.usefixtures("one_thread")
NARROW = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
CLIP = "vit_base_patch16_clip_224"
GIANT = "vit_giant_patch14_dinov2"

# name: (settings, timm's architecture that it becomes where it is not the plain one)
NATIVE = {
    "cls": ({}, None),
    "cls, norm after": ({"fc_norm": True}, None),
    "gap": ({"pool": "gap"}, None),
    "gap, norm before": ({"pool": "gap", "fc_norm": False}, None),
    "gap, norm after": ({"pool": "gap", "fc_norm": True}, None),
    "gap with prefix": ({"pool": "gap", "pool_include_prefix": True}, None),
    "max": ({"pool": "max"}, None),
    "avgmax": ({"pool": "avgmax"}, None),
    "avgmax, norm before": ({"pool": "avgmax", "fc_norm": False}, None),
    "avgmax, no class token": ({"pool": "avgmax", "reg_tokens": 2, "class_token": False}, None),
    "class token last, which nobody sees": ({"class_position": "last"}, None),
    "map": ({"pool": "map"}, None),
    "map, norm after": ({"pool": "map", "fc_norm": True}, None),
    "no class token": ({"pool": "gap", "class_token": False}, None),
    "registers": ({"reg_tokens": 3}, None),
    "registers without positions": ({"reg_tokens": 2, "no_embed_class": True}, None),
    "no_embed_class": ({"no_embed_class": True}, None),
    "layer scale": ({"init_values": 0.1}, None),
    "qk_norm": ({"qk_norm": True}, None),
    "no qkv_bias": ({"qkv_bias": False}, None),
    "pre_norm": ({"pre_norm": True, "norm_eps": 1e-5}, CLIP),
    "eps 1e-5": ({"norm_eps": 1e-5, "act": "quick_gelu"}, CLIP),
    "gelu_tanh": ({"act": "gelu_tanh"}, None),
    "quick_gelu": ({"act": "quick_gelu"}, None),
    "swiglu": ({"mlp": "swiglu_packed", "act": "silu", "init_values": 0.1}, GIANT),
    "swiglu, no layer scale": ({"mlp": "swiglu_packed", "act": "silu"}, GIANT),
    "odd mlp_ratio": ({"mlp_ratio": 3.3}, None),
    "no final norm": ({"final_norm": False}, None),
    "no final norm, gap": ({"final_norm": False, "pool": "gap"}, None),
    "grey": ({"in_chans": 1}, None),
    "four channels": ({"in_chans": 4}, None),
    "rectangular": ({"img_size": (16, 24)}, None),
    "rectangular with registers": ({"img_size": (8, 24), "reg_tokens": 2}, None),
    "sincos2d": ({"pos_embed": "sincos2d"}, None),
    "no positions": ({"pos_embed": "none"}, None),
    "last pixels left out": ({"img_size": 18, "floor_grid": True}, None),
    "floor_grid for nothing": ({"floor_grid": True}, None),
    "dropout": ({"drop_rate": 0.1, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}, None),
    "headless": ({"num_classes": 0}, None),
}
# name: settings
ADAPTED = {
    "eva02_tiny_patch14_224": {"img_size": 28},
    "beit_base_patch16_224": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "vit_small_patch16_dinov3": {"img_size": 32},
    "aimv2_large_patch14_224": {"img_size": 28},
    "vit_pe_spatial_tiny_patch16_512": {"img_size": 32},  # no final norm
}


@torch.inference_mode()
def _check(classifier: ImageClassifier, folder, architecture: str) -> None:
    """The whole contract of an export."""
    export = export_timm(classifier, folder)
    assert (export.folder, export.architecture) == (folder, architecture)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    images = random_images(classifier)
    logits = classifier.model(images)
    theirs = opened_by_timm(folder)
    assert relative_difference(theirs(images), logits) <= 1e-5
    pre = classifier.preprocess
    expected = {"mean": pre.mean, "std": pre.std, "crop_pct": 0.8, "crop_mode": "squash"}
    expected |= {"interpolation": "bilinear", "input_size": (len(pre.mean), *pre.img_size)}
    data = timm.data.resolve_model_data_config(theirs)
    listed = {key: tuple(data[key]) if isinstance(data[key], list) else data[key] for key in expected}
    assert listed == expected
    assert (theirs.pretrained_cfg.get("label_names") or []) == classifier.class_names
    again = load(folder)
    assert relative_difference(again.model(images), logits) <= 1e-6
    assert again.class_names == classifier.class_names
    assert again.preprocess == pre
    assert again.weights_licence == "cc-by-4.0"
    assert again.model.config.pool == classifier.model.config.pool
    assert not again.model.load_report.of("fresh")
    assert not again.model.load_report.of("dropped")


@pytest.mark.parametrize("case", NATIVE)
def test_a_native_model_opens_in_timm_and_comes_back(case, tiny, tmp_path):
    settings, architecture = NATIVE[case]
    _check(native_classifier(tiny, **settings), tmp_path / "out", architecture or "vit_base_patch16_224")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("settings", [{}, {"in_chans": 1}, {"num_classes": 0}], ids=str)
def test_an_adapted_model_opens_in_timm_and_comes_back(name, settings, tmp_path):
    model = create_model(name, **{**NARROW, **ADAPTED[name], **settings})
    _check(classifier_of(model), tmp_path / "out", name)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("eva02_tiny_patch14_224", "cls"),
        ("eva02_tiny_patch14_224", "max"),
        ("beit_base_patch16_224", "cls"),
        ("vit_small_patch16_dinov3", "gap"),
        ("vit_small_patch16_dinov3", "avgmax"),
        ("aimv2_large_patch14_224", "max"),
        ("vit_pe_spatial_tiny_patch16_512", "cls"),
    ],
)
def test_an_adapted_model_keeps_another_pool(name, pool, tmp_path):
    model = create_model(name, pool=pool, **NARROW, **ADAPTED[name])
    _check(classifier_of(model), tmp_path / "out", name)


@torch.inference_mode()
def test_the_epsilon_of_transformers_is_the_same_model_in_float32(tiny, tmp_path):
    classifier = native_classifier(tiny, norm_eps=1e-12)
    export = export_timm(classifier, tmp_path / "out")
    assert 0 < export.difference <= 1e-4
    images = random_images(classifier)
    assert relative_difference(opened_by_timm(tmp_path / "out")(images), classifier.model(images)) <= 1e-4


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("vit_small_patch16_224.augreg_in21k", "vit_small_patch16_224"),
        ("vit_small_patch16_siglip_unknown", "vit_base_patch16_224"),
        ("runs/vit_tiny.safetensors", "vit_base_patch16_224"),
        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_224"),  # its epsilon is another
        ("eva02_tiny_patch14_224", "vit_base_patch16_224"),  # no native architecture
    ],
)
def test_a_fine_tuned_model_keeps_its_architectures_name_where_that_is_the_same(
    source, architecture, tiny, tmp_path
):
    classifier = native_classifier(tiny, act="quick_gelu")
    classifier.weights_source = source
    assert export_timm(classifier, tmp_path / "out").architecture == architecture


def test_weights_load_strictly_into_timms_model_of_the_same_name_and_back():
    size = {"img_size": 32, "depth": 2}
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_224", *ADAPTED):
        size["img_size"] = ADAPTED.get(name, {"img_size": 32})["img_size"]
        ours = create_model(name, num_classes=5, **size)
        theirs = timm.create_model(name, num_classes=5, **size)
        theirs.load_state_dict(ours.state_dict())
        state = {key: tensor + 1 for key, tensor in theirs.state_dict().items()}
        ours.load_state_dict(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())


def test_the_norm_stands_after_those_poolings_where_it_does_in_timm():
    assert set(TIMM_POOLS.values()) <= set(POOLINGS)
    for theirs, ours in TIMM_POOLS.items():
        config = native_config(skeleton("vit_tiny_patch16_224", global_pool=theirs))
        assert config.pool == ours
        assert config.fc_norm is None  # what the name implies
        assert POOLINGS[ours].norm_after == (ours in NORM_AFTER)


LACKING = [("native", spec) for spec in POOLS if spec not in TIMM_POOLS.values()]


@pytest.mark.parametrize(("kind", "pool"), [*LACKING, ("adapted", "token:3"), ("adapted", "cls+gap")])
def test_a_pool_that_timm_lacks_is_refused_with_those_that_it_has(kind, pool, tiny, tmp_path):
    message = rf"no counterpart of model.pool {re.escape(pool)}; it knows cls, gap, max, avgmax, map\."
    if kind == "native":
        classifier = native_classifier(tiny, pool=pool)
    else:
        classifier = classifier_of(create_model("vit_small_patch16_dinov3", pool=pool, img_size=32, **NARROW))
    with pytest.raises(ConfigError, match=message):
        export_timm(classifier, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_eps": 1e-3}, r"timm has no architecture with .* model.norm_eps 0.001"),
        (
            {"mlp": "swiglu_packed", "act": "silu", "norm_eps": 1e-5},
            r"model.mlp swiglu_packed, model.act silu",
        ),
        ({"causal": True}, r"no counterpart of model.causal true.*--format safetensors"),
        ({"causal": True, "class_position": "last"}, r"no counterpart of model.causal true"),
    ],
    ids=str,
)
def test_a_native_model_that_timm_cannot_be_is_refused(settings, message, tiny, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_timm(native_classifier(tiny, **settings), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "pool", "message"),
    [
        (
            "beit_base_patch16_224",
            "map",
            r"cannot have model.pool map: Only avg or token pooling \(or none\)",
        ),
        ("deit_tiny_distilled_patch16_224", "gap", r"cannot have model.pool gap: The distilled head reads"),
        (
            "deit_tiny_distilled_patch16_224",
            "cls",
            r"model.pool cls has other weights than this model: head_dist.weight, head_dist.bias\. Export",
        ),
        (
            "aimv2_large_patch14_224",
            "map",
            r"has other weights than this model: attn_pool\S+ \S+ \S+ and 1 more",
        ),
    ],
)
def test_an_adapted_model_that_timm_cannot_be_is_refused(name, pool, message, tmp_path):
    model = create_model(name, pool=pool, **NARROW, **ADAPTED[name])
    with pytest.raises(ConfigError, match=message):
        export_timm(classifier_of(model), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_other_logits_than_ours_are_refused_and_nothing_is_left(tmp_path):
    """timm's pooling by attention in this architecture reads the class token too; ours, the patches."""
    model = create_model("vit_small_patch16_dinov3", pool="map", img_size=32, **NARROW)
    message = (
        r"differ .* more than 0.0001: timm's vit_small_patch16_dinov3 with model.pool map is not the same"
    )
    with pytest.raises(ModelFileError, match=message):
        export_timm(classifier_of(model), tmp_path / "made" / "for" / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("no space left"), SafetensorError("no space left")], ids=repr)
def test_after_a_full_disk_nothing_is_left(error, tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("vit_cls.export.timm.save_for_hf", full)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new", "made/for/out"):
        with pytest.raises(OSError, match="no space left"):
            export_timm(native_classifier(tiny), tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_is_taken_is_refused_and_stays_as_it_was(kind, tiny, tmp_path):
    taken = tmp_path / "taken"
    if kind == "folder":
        taken.mkdir()
    (taken / "notes.txt" if kind == "folder" else taken).write_text("mine")
    with pytest.raises(ConfigError, match=r"taken is not an empty folder. Give a new one"):
        export_timm(native_classifier(tiny), taken)
    assert (taken / "notes.txt" if kind == "folder" else taken).read_text() == "mine"
    assert os.listdir(tmp_path) == ["taken"]


def test_an_empty_folder_is_taken(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    export_timm(native_classifier(tiny), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
