"""Tiny models of transformers, saved as its folders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import perturbed

transformers = pytest.importorskip("transformers")

NAMES = ["wasp", "bee", "ant", "fly", "moth"]  # out of alphabetical order on purpose
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
CLASSIFIER = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
VIT = {"intermediate_size": 120}

WITH_REGISTERS, REGISTERS = "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"

# name: (class, configuration, settings)
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "vit headless": ("ViTModel", "ViTConfig", VIT),
    "vit eps 1e-6": ("ViTForImageClassification", "ViTConfig", {**VIT, "layer_norm_eps": 1e-6}),
    "vit quick_gelu": ("ViTForImageClassification", "ViTConfig", {**VIT, "hidden_act": "quick_gelu"}),
    "vit gelu_new": ("ViTForImageClassification", "ViTConfig", {**VIT, "hidden_act": "gelu_new"}),
    "vit silu": ("ViTForImageClassification", "ViTConfig", {**VIT, "hidden_act": "silu"}),
    "vit no qkv_bias": ("ViTForImageClassification", "ViTConfig", {**VIT, "qkv_bias": False}),
    "vit grey": ("ViTForImageClassification", "ViTConfig", {**VIT, "num_channels": 1}),
    "vit rectangular": ("ViTForImageClassification", "ViTConfig", {**VIT, "image_size": [32, 48]}),
    "vit for masks": ("ViTForMaskedImageModeling", "ViTConfig", {**VIT, "encoder_stride": 8}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit headless": ("DeiTModel", "DeiTConfig", VIT),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {"layerscale_value": 0.3}),
    "dinov2 headless": ("Dinov2Model", "Dinov2Config", {}),
    "dinov2 swiglu": ("Dinov2ForImageClassification", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov2 quick_gelu": ("Dinov2ForImageClassification", "Dinov2Config", {"hidden_act": "quick_gelu"}),
    "dinov2 no qkv_bias": ("Dinov2ForImageClassification", "Dinov2Config", {"qkv_bias": False}),
    "registers": (WITH_REGISTERS, REGISTERS, {}),
    "registers headless": ("Dinov2WithRegistersModel", REGISTERS, {"num_register_tokens": 2}),
    "registers swiglu": (WITH_REGISTERS, REGISTERS, {"use_swiglu_ffn": True, "qkv_bias": False}),
}


def make_model(name: str, config: str, settings: dict) -> nn.Module:
    """Every parameter off its initial value; tokens and positions on a grid where their sums are exact."""
    model = getattr(transformers, name)(getattr(transformers, config)(**{**TINY, **CLASSIFIER, **settings}))
    perturbed(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token" in key or "position" in key:
                parameter.mul_(1024).round_().div_(1024)
    return model


def saved_model(case: str, folder) -> nn.Module:
    model = make_model(*MODELS[case])
    model.save_pretrained(folder)
    return model


def random_images(config, *, dtype=torch.float32) -> Tensor:
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, config.num_channels, *sides, generator=generator, dtype=dtype)
