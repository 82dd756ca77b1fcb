"""What can be built and loaded: every architecture with its tags, for people and for scripts."""

from __future__ import annotations

import fnmatch
from typing import Any

from timm.models import PretrainedCfg

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.config import ViTConfig
from vit_cls.model.presets import PRESETS, preset_config
from vit_cls.model.tokens import TokenLayout
from vit_cls.weights.adapter import adapter_config
from vit_cls.weights.families import is_non_commercial, recipe_of
from vit_cls.weights.timm_models import (
    QUICK_GELU_NOTE,
    architectures,
    class_names_of,
    matching,
    native_config,
    pretrained_config,
    skeleton,
    tags,
)

NORMALISATIONS = {
    (0.5, 0.5): "0.5",
    (0.0, 1.0): "none",
    (0.485, 0.229): "imagenet",
    (0.48145466, 0.26862954): "clip",
}
"""Name of a mean and standard deviation, by the first channel's."""


def find(pattern: str) -> list[str]:
    """Architectures that a name or a pattern (``*clip*``; of tags ``*.openai``) means, or ConfigError."""
    own = [name for name in fnmatch.filter(PRESETS, pattern) if name not in architectures()]
    names = own + matching(pattern)
    if not names:
        known = [*PRESETS, *architectures(), *tags()]
        raise ConfigError(
            f"no architecture matches {pattern!r}.{did_you_mean(pattern, known)} "
            "`vit-cls models` lists them all."
        )
    return names


def describe(name: str) -> dict[str, Any]:
    """Everything about one architecture, named without a tag, its default tag first; or ConfigError."""
    if name in PRESETS and name not in architectures():
        return _row(name, preset_config(name), _parameters_of_preset(name), "0.5", [])
    default = pretrained_config(name)
    model = skeleton(name)
    config = native_config(model)
    parameters = sum(p.numel() for p in model.parameters())
    known = [tag for tag in tags() if tag.partition(".")[0] == name]
    known.sort(key=lambda tag: tag != f"{name}.{default.tag}")
    described = [_tag_row(tag, pretrained_config(tag)) for tag in known]
    return _row(name, config or adapter_config(name, model), parameters, _normalisation(default), described)


def _parameters_of_preset(name: str) -> int:
    import torch

    from vit_cls.model.vit import VisionTransformer

    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(preset_config(name)).parameters())


def _normalisation(record: PretrainedCfg) -> str:
    return NORMALISATIONS.get((record.mean[0], record.std[0]), "other")


def _row(
    name: str, config: Any, parameters: int, normalisation: str, tag_rows: list[dict[str, Any]]
) -> dict[str, Any]:
    layout = TokenLayout(config.class_token, config.reg_tokens, config.grid_size)
    return {
        "name": name,
        "kind": "native" if isinstance(config, ViTConfig) else "adapter",
        "parameters": parameters,
        "img_size": config.image_hw[0],
        "patch_size": config.patch_size,
        "tokens": layout.num_tokens,
        "class_token": config.class_token,
        "reg_tokens": config.reg_tokens,
        "pool": config.pool,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "normalisation": normalisation,
        "tags": tag_rows,
    }


def _tag_row(name: str, record: PretrainedCfg) -> dict[str, Any]:
    classes = "headless" if record.num_classes == 0 else "projection"
    if record.num_classes and class_names_of(record) is not None:
        classes = "classes"
    quick = any(QUICK_GELU_NOTE in note for note in record.notes or ())
    return {
        "tag": name.partition(".")[2],
        "img_size": record.input_size[1],
        "num_classes": record.num_classes,
        "head": classes,
        "normalisation": _normalisation(record),
        "mean": list(record.mean),
        "std": list(record.std),
        "crop_pct": record.crop_pct,
        "crop_mode": record.crop_mode,
        "interpolation": record.interpolation,
        "licence": record.license,
        "non_commercial": is_non_commercial(record.license),
        "family": recipe_of(name).family,
        "quick_gelu": quick,
    }
