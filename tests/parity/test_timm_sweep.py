"""Every architecture of timm's plain ViTs and their relatives: its keys, its numbers, and round trip back."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import timm
import torch

from vit_cls.model.config import ViTConfig
from vit_cls.weights.adapter import adapter_config
from vit_cls.weights.architecture import build_model
from vit_cls.weights.timm_models import (
    architectures,
    make_timm,
    module_of,
    native_config,
    preprocess_of,
    pretrained_config,
    skeleton,
    tags,
)

COVERED: Counter[str] = Counter()


def _perturbed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move norms, LayerScales, tokens and the rest far off their defaults, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gamma" in name:
                parameter.copy_(0.5 + noise.abs())
            elif name.endswith("_token"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.add_(0.05 * noise)
    return model.eval()


def _narrow(name: str) -> dict[str, Any]:
    """Arguments that make an architecture small, with heads as wide as they are: rotations depend on that."""
    model = skeleton(name)
    config = native_config(model) or adapter_config(name, model)
    patch = config.patch_size
    small: dict[str, Any] = {"depth": 2, "num_heads": 2, "img_size": 3 * patch}
    small["embed_dim"] = 2 * (config.embed_dim // config.num_heads)
    if isinstance(config, ViTConfig) and config.floor_grid:
        small["img_size"] += 2  # pixels that no patch covers stay
    if name.endswith("sapiens2"):
        small["num_kv_heads"] = 1  # a list with one entry a block otherwise
    return small


@pytest.mark.parametrize("name", architectures())
def test_keys_and_logits_are_timms(name):
    small = _narrow(name)
    theirs = _perturbed(make_timm(name, num_classes=7, **small))
    config = native_config(theirs)
    if config is None:
        arguments = {key: value for key, value in small.items() if key != "img_size"}
        config = adapter_config(name, theirs, **arguments)
    ours = build_model(config).eval()
    state = theirs.state_dict()
    if isinstance(config, ViTConfig):
        assert list(ours.state_dict()) == list(state)
    else:
        assert set(ours.state_dict()) == set(state)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, *config.image_hw, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(images)
        scale = expected.abs().max()
        assert scale > 0.01
        assert (ours(images) - expected).abs().max() <= 1e-5 * scale
        tokens = theirs.forward_features(images)
        assert (ours.encode(images) - tokens).abs().max() <= 1e-5 * tokens.abs().max()
        assert ours.embed_tokens(images).shape == tokens.shape
    back = ours.state_dict()
    theirs.load_state_dict(back)
    assert all(torch.equal(back[key], state[key]) for key in state)
    COVERED[f"{module_of(name)} {'native' if isinstance(config, ViTConfig) else 'adapter'}"] += 1


def test_the_sweep_covered_every_architecture(request):
    if len(request.session.items) < 200:
        pytest.skip("a part of the tests was selected")
    by_module: Counter[str] = Counter()
    for key, count in COVERED.items():
        by_module[key.split()[0]] += count
    for module, least in (("vision_transformer", 163), ("deit", 16), ("eva", 65), ("beit", 7)):
        assert by_module[module] == len(timm.list_models(module=module)) >= least
    assert COVERED["vision_transformer native"] >= 136
    assert sum(COVERED.values()) == len(architectures()) >= 251


def test_every_tag_says_how_its_images_are_prepared():
    assert len(tags()) >= 429
    for tag in tags():
        record = pretrained_config(tag)
        pre = preprocess_of(record)
        data = timm.data.resolve_data_config(pretrained_cfg=record.to_dict())
        assert (3, *pre.img_size) == tuple(data["input_size"])
        assert (pre.mean, pre.std) == (tuple(data["mean"]), tuple(data["std"]))
        assert (pre.crop_pct, pre.crop_mode) == (data["crop_pct"], data["crop_mode"])
        assert pre.interpolation == data["interpolation"]


FULL = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
]
if os.environ.get("EVERY_FAMILY"):
    FULL += [
        "vit_small_patch32_224",
        "vit_base_patch32_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch32_siglip_gap_256",
        "vit_wee_patch16_reg1_gap_256",
        "deit3_small_patch16_224",
        "beit_base_patch16_224",
    ]


@pytest.mark.parametrize("name", FULL)
def test_logits_are_timms_at_full_depth_and_width(name):
    theirs = _perturbed(make_timm(name, num_classes=10))
    config = native_config(theirs) or adapter_config(name, theirs)
    ours = build_model(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, *config.image_hw, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
