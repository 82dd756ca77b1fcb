"""How the models of a study are trained, unless the question itself varies it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vit_cls.checks import check_finite, check_range

_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
MODEL_KEYS = ("name", "pretrained", *_SIZES, "fc_norm")
OPTIM_KEYS = ("lr", "weight_decay", "label_smoothing", "warmup_epochs")
DATA_KEYS = ("batch_size", "augment")


@dataclass(frozen=True)
class Recipe:
    """Training settings that all models of a study share; null takes what suits the data (see `RECIPES`).

    Args:
        name: An architecture of ``vit-cls models``; ``auto`` takes that of the weights.
        pretrained: Weights to start from, a tag, a file or a folder; null starts from fresh ones.
        img_size: Side of the input in pixels.
        patch_size: Side of a patch in pixels.
        embed_dim: Width of a token.
        depth: Encoder blocks.
        num_heads: Attention heads in each block.
        mlp_ratio: Hidden width of the MLP over the width of a token.
        fc_norm: Whether the final norm stands after the pooling; null follows timm (after a mean or maximum).
        epochs: Epochs of each training; the model after the last one counts, none is selected.
        batch_size: Images a step.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        label_smoothing: Probability mass spread over all classes.
        warmup_epochs: Linear warm-up; null takes a tenth of the training, 5 epochs at most.
        augment: Training transform, as in ``fit``.

    Raises:
        ConfigError: If a number is out of range.
    """

    name: str | None = None
    pretrained: str | None = None
    img_size: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    fc_norm: bool | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    warmup_epochs: float | None = None
    augment: str | None = None

    def __post_init__(self) -> None:
        check_finite("--recipe.", self)
        for name in ("epochs", "batch_size", "lr"):
            check_range(f"--recipe.{name}", getattr(self, name), above=0)

    def resolved(self, data: str) -> Recipe:
        """The same with what suits ``digits`` or a folder filled in."""
        usual = RECIPES["digits" if data == "digits" else "finetune" if self.pretrained else "scratch"]
        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(usual, **given)

    def part(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """Some of the settings, those that are null left out."""
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


RECIPES = {
    # 16 tokens of width 32: seconds on one core
    "digits": Recipe(
        name="vit_pico_patch7_28",
        img_size=8,
        patch_size=2,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
        fc_norm=False,  # each token is normalised before any head: all heads read the same tokens
        epochs=60,
        batch_size=128,
        lr=3e-3,
        weight_decay=0.05,
        label_smoothing=0.05,
        augment="none",
    ),
    "scratch": Recipe(
        name="vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        embed_dim=128,
        depth=6,
        num_heads=4,
        epochs=30,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.05,
        label_smoothing=0.1,
        augment="crop_flip",
    ),
    "finetune": Recipe(
        name="auto",
        epochs=10,
        batch_size=64,
        lr=1e-4,
        weight_decay=0.05,
        label_smoothing=0.1,
        augment="crop_flip",
    ),
}
