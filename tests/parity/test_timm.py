"""Same weights, same input: the same numbers as timm's, and its keys."""

from __future__ import annotations

import inspect
import math
import os

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT

from tests.models import perturbed
from vit_cls import create_model
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer

LARGER = [("vit_base_patch16_224", "cls"), ("vit_large_patch16_224", "cls")]
"""Half a minute for their weights alone."""
GLOBAL_POOL = {"cls": "token", "gap": "avg", "max": "max", "avgmax": "avgmax"}


def _reference_timm(config: ViTConfig) -> torch.nn.Module:
    same = inspect.signature(TimmViT).parameters
    arguments = {name: value for name, value in config.to_dict().items() if name in same}
    arguments["pos_embed"] = "none" if config.pos_embed == "none" else "learn"
    return TimmViT(
        **arguments,
        global_pool=GLOBAL_POOL[config.pool],
        norm_layer=lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=config.norm_eps, **kwargs),
        act_layer=config.act,
    )


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("vit_tiny_patch16_224", "cls"),
        ("vit_tiny_patch16_224", "gap"),
        ("vit_tiny_patch16_224", "max"),
        ("vit_tiny_patch16_224", "avgmax"),
        ("vit_small_patch16_224", "cls"),
        *(LARGER if os.environ.get("EVERY_FAMILY") else []),
    ],
)
def test_logits_equal_timms_at_full_size(name, pool):
    torch.manual_seed(0)
    theirs = perturbed(timm.create_model(name, global_pool=GLOBAL_POOL[pool]), scale=0.02)
    ours = create_model(name, pool=pool).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (ours(images) - theirs(images)).abs().max() <= 1e-5
        assert ours.embed_tokens(images).shape == (2, 197, theirs.embed_dim)
        double = images[:1].double()
        assert (ours.double()(double) - theirs.double()(double)).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"pool": "gap"},
        {"pool": "max"},
        {"pool": "avgmax", "reg_tokens": 2},
        {"pool": "avgmax", "fc_norm": False},
        {"pool": "gap", "fc_norm": False},
        {"pool": "cls", "fc_norm": True},
        {"pool": "gap", "class_token": False},
        {"reg_tokens": 3},
        {"reg_tokens": 3, "pool": "gap"},
        {"reg_tokens": 2, "no_embed_class": True},
        {"no_embed_class": True, "pool": "gap"},
        {"pos_embed": "none"},
        {"pre_norm": True, "norm_eps": 1e-5},
        {"final_norm": False},
        {"final_norm": False, "pool": "gap"},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"act": "gelu_tanh"},
        {"act": "quick_gelu"},
        {"mlp_ratio": 3.5},
        {"in_chans": 1},
        {"img_size": (16, 24)},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_every_option_has_timms_keys_and_numbers(setting, tiny):
    config = ViTConfig.from_dict({**tiny, "num_classes": 7, **setting})
    theirs = perturbed(_reference_timm(config), scale=0.02).double()
    ours = VisionTransformer(config).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    shape = (2, config.in_chans, *config.image_hw)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.encode(images), theirs.forward_features(images), rtol=0, atol=1e-12)
    theirs.load_state_dict(ours.state_dict())  # and back


def test_fresh_weights_have_timms_spread():
    torch.manual_seed(0)
    ours = dict(create_model("vit_tiny_patch16_224").named_parameters())
    theirs = dict(timm.create_model("vit_tiny_patch16_224").named_parameters())
    for name, parameter in theirs.items():
        spread, expected = ours[name].std().item(), parameter.std().item()
        if parameter.numel() < 1000:
            assert math.isclose(spread, expected, rel_tol=0.25, abs_tol=1e-6), name
        else:
            assert math.isclose(spread, expected, rel_tol=0.05, abs_tol=1e-6), name


def test_drop_path_draws_timms_masks(tiny):
    config = ViTConfig.from_dict({**tiny, "num_classes": 7, "depth": 3, "drop_path_rate": 0.5})
    theirs = perturbed(_reference_timm(config), scale=0.02).train()
    ours = VisionTransformer(config).train()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    expected = theirs(images)
    torch.manual_seed(5)
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)
