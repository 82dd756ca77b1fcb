"""Named architectures: timm's names for the usual sizes, and small ones for images of 28 to 64 pixels."""

from __future__ import annotations

from typing import Any

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.config import ViTConfig

# Width, depth and heads of each size. Tiny to huge: ViT table 1 and DeiT; nano and pico are ours.
SIZES: dict[str, dict[str, int]] = {
    "pico": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    "nano": {"embed_dim": 128, "depth": 6, "num_heads": 4},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}

# The patch and image sides, in pixels, that each size comes in.
_GRID: dict[str, list[tuple[int, int]]] = {
    "pico": [(7, 28), (4, 28), (4, 32), (8, 64)],
    "nano": [(7, 28), (4, 28), (4, 32), (8, 64)],
    "tiny": [(16, 224), (16, 384)],
    "small": [(8, 224), (16, 224), (16, 384), (32, 224), (32, 384)],
    "base": [(8, 224), (16, 224), (16, 384), (32, 224), (32, 384)],
    "large": [(14, 224), (16, 224), (16, 384), (32, 224), (32, 384)],
    "huge": [(14, 224)],
}

PRESETS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}_{img}": {**SIZES[size], "patch_size": patch, "img_size": img}
    for size, shapes in _GRID.items()
    for patch, img in shapes
}


def preset_config(name: str, **overrides: Any) -> ViTConfig:
    """The architecture of that row of `PRESETS`, with some fields of `ViTConfig` changed.

    Args:
        name: Such as ``vit_tiny_patch16_224``.

    Raises:
        ConfigError: If the name or a setting is unknown, or the settings do not fit together.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"model.name {name!r} is not a known architecture.{did_you_mean(name, PRESETS)} "
            "`vit-cls models` lists them all."
        )
    return ViTConfig.from_dict({**PRESETS[name], **overrides})
