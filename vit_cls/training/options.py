"""What a user sets for one training run; the command line and YAML become these dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from vit_cls.errors import ConfigError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.presets import preset_config
from vit_cls.model.vit import VisionTransformer


@dataclass(frozen=True)
class ModelOptions:
    """The architecture: a name, what its head reads, and changes; null keeps what the name stands for.

    Args:
        name: An architecture of ``vit-cls models``.
        pool: What the head reads: ``cls``, ``gap``, ``max`` or ``token:K`` (patch K in raster order).
        img_size: Side of the input in pixels; divisible by the patch size.
        patch_size: Side of a patch in pixels.
        embed_dim: Width of a token; divisible by the number of heads.
        depth: Encoder blocks.
        num_heads: Attention heads in each block.
        mlp_ratio: Hidden width of the MLP over the width of a token.
        qk_norm: Whether queries and keys are normalised for each head.
        init_values: First value of LayerScale; null means no LayerScale.
        class_token: Whether a class token is prepended.
        reg_tokens: Register tokens.
        pos_embed: Positions: ``learn``, ``sincos2d`` (fixed) or ``none``.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the positions.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        crop_pct: Side of the evaluation crop over the side of the resized image.
        crop_mode: Evaluation crop: ``center`` or ``squash``.
    """

    name: str = "vit_tiny_patch16_224"
    pool: str = "cls"
    img_size: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    qk_norm: bool | None = None
    init_values: float | None = None
    class_token: bool | None = None
    reg_tokens: int | None = None
    pos_embed: str | None = None
    drop_rate: float | None = None
    pos_drop_rate: float | None = None
    proj_drop_rate: float | None = None
    attn_drop_rate: float | None = None
    drop_path_rate: float | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    def build(self, class_names: list[str]) -> ImageClassifier:
        """A classifier with fresh weights, drawn from torch's global generator.

        Args:
            class_names: One name an output.

        Raises:
            ConfigError: If the settings do not make a model.
        """
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "name"}
        crop = {k: given.pop(k) for k in ("crop_pct", "crop_mode") if k in given}
        config = preset_config(self.name, num_classes=len(class_names), **given)
        preprocess = dataclasses.replace(Preprocess.for_size(config.image_hw), **crop)
        return ImageClassifier(VisionTransformer(config), preprocess, class_names)


@dataclass(frozen=True)
class OptimOptions:
    """AdamW with warm-up and cosine decay.

    Args:
        base_lr_per_256_images: Peak learning rate for 256 images a step; scaled by the images of a step
            over all processes and accumulated batches.
        lr: Peak learning rate as it is, instead of the scaled one.
        min_lr_ratio: Last learning rate over the peak, in [0, 1].
        warmup_epochs: Linear warm-up; null means a tenth of the run, 5 epochs at most.
        weight_decay: Decoupled weight decay; never on norms, biases, tokens and positions.
        beta1: Decay of the gradient's average.
        beta2: Decay of the squared gradient's average.
        eps: Added to the denominator.
        label_smoothing: Probability mass spread over all classes, in [0, 1).

    Raises:
        ConfigError: If a value is out of range.
    """

    base_lr_per_256_images: float = 5e-4
    lr: float | None = None
    min_lr_ratio: float = 0.01
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("base_lr_per_256_images", "lr", "eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"optim.{name} must be above 0; got {value}.")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"optim.{name} must not be negative; got {value}.")
        for name, below_one in (
            ("min_lr_ratio", False),
            ("label_smoothing", True),
            ("beta1", True),
            ("beta2", True),
        ):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (below_one and value == 1):
                raise ConfigError(f"optim.{name} must be in [0, 1{')' if below_one else ']'}; got {value}.")


@dataclass(frozen=True)
class FitOptions:
    """Everything of a run that is neither the data nor Lightning's trainer.

    Args:
        model: The architecture.
        optim: The optimiser.
        seed: Seed of weights, split, order and augmentation.
        run_dir: The run folder; null means ``runs/NAME_POOL_N`` with the first free N.
        resume: ``auto`` continues ``run_dir`` if it was begun; a run folder continues that one.
        early_stopping_patience: Stop when ``val/acc1`` has not improved for this many epochs; null never.
        compile: Whether the encoder's blocks are compiled.

    Raises:
        ConfigError: If a value is out of range.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    seed: int = 0
    run_dir: str | None = None
    resume: str | None = None
    early_stopping_patience: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}; got {self.seed}.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ConfigError(
                f"early_stopping_patience must be at least 1; got {self.early_stopping_patience}."
            )
