"""Everything that defines a Vision Transformer's shape and function, as one checked, plain dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vit_cls.checks import check_choice, check_finite, check_range
from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.pooling import num_class_tokens
from vit_cls.model.tokens import CLASS_POSITIONS, TokenLayout

POS_EMBEDS = ("learn", "sincos2d", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
MLPS = ("mlp", "swiglu_packed")
LIMITS = {
    "img_size": 65_536,
    "patch_size": 4_096,
    "in_chans": 1_024,
    "num_classes": 1_000_000,
    "embed_dim": 65_536,
    "depth": 1_000,
    "num_heads": 4_096,
    "reg_tokens": 10_000,
    "mlp_ratio": 1_000,
    "patches": 65_536,
}
"""Largest values; beyond them a number is a mistake or an attack, and building the model would never end."""


class ModelConfig(Protocol):
    """What every token model's configuration tells, native or adapted."""

    @property
    def num_classes(self) -> int:
        """Classes of the head; 0 where the model is headless."""

    @property
    def in_chans(self) -> int:
        """Channels of the image."""

    @property
    def pool(self) -> str:
        """What the head reads."""

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""

    @property
    def embed_dim(self) -> int:
        """Width of a token."""

    @property
    def depth(self) -> int:
        """Encoder blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads in each block."""

    @property
    def class_token(self) -> bool:
        """Whether there is a class token."""

    @property
    def reg_tokens(self) -> int:
        """Register tokens after it."""

    @property
    def no_embed_class(self) -> bool:
        """Whether prefix tokens go without a position."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width, in pixels."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold and the model is rebuilt from."""


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a Vision Transformer, with timm's argument names.

    Args:
        img_size: Image height and width in pixels; one number means a square.
        patch_size: Side of a square patch in pixels; divides both image sides.
        num_classes: Classes of the linear head; 0 leaves the model headless (it returns features).
        pool: What the head reads: rows of `vit_cls.model.pooling.POOLINGS`, any of them joined by ``+``:
            ``cls``, ``gap``, ``token:K`` (patch K, from 0 in raster order), ``cls+gap``, ``map``... It
            decides how many class tokens there are: K with ``multicls:K``, one a class with ``classtok``.
        embed_dim: Width of a token; divisible by ``num_heads``.
        depth: Encoder blocks.
        mlp_ratio: Hidden width of the MLP, in multiples of ``embed_dim``.
        qk_norm: Whether queries and keys are normalised for each head.
        init_values: First value of LayerScale; None means no LayerScale.
        reg_tokens: Register tokens, after the class token; read by no pooling.
        no_embed_class: Whether prefix tokens go without a position embedding.
        pos_embed: Positions: ``learn``, ``sincos2d`` (fixed) or ``none``.
        pre_norm: Whether a norm stands before the first block (the patch embedding then has no bias).
        final_norm: Whether there is a norm after the last block at all.
        fc_norm: Whether that norm stands after pooling; None follows timm's constructor where timm has the
            pooling: after ``gap``, ``max``, ``avgmax``, ``gem``, ``lse`` and ``cait:K``, before all others.
        act: ``gelu``, ``gelu_tanh``, ``quick_gelu`` or ``silu``.
        mlp: ``mlp``, or ``swiglu_packed``: gated, both halves in one matrix (DINOv2 giant).
        pool_include_prefix: Whether poolings over the patches read class token and registers too.
        causal: Whether each token attends to itself and to what comes before it alone.
        class_position: Where class tokens stand among the others: ``first``, ``middle`` or ``last``. Only a
            causal model can tell, since attention knows no order (`vit-cls verify` shows it). Tensors hold
            them first in any case.
        floor_grid: Whether an image side that the patch size does not divide is allowed; the patches then
            leave out its last pixels, as in SigLIP's 384 pixels of 14.
        drop_rate: Dropout before the head, in [0, 1).
        pos_drop_rate: Dropout after the position embedding, in [0, 1).
        proj_drop_rate: Dropout after attention's and the MLP's projections, in [0, 1).
        drop_path_rate: Stochastic depth of the last block, in [0, 1); rises linearly from 0.

    Raises:
        ConfigError: If a value is impossible, alone or together with another.

    Example:
        >>> ViTConfig(img_size=28, patch_size=7).grid_size
        (4, 4)

    Source:
        ViT, https://arxiv.org/abs/2010.11929; names and defaults: timm's ``VisionTransformer``.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    pool: str = "cls"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pos_embed: str = "learn"
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    norm_eps: float = 1e-6
    act: str = "gelu"
    mlp: str = "mlp"
    pool_include_prefix: bool = False
    causal: bool = False
    class_position: str = "first"
    floor_grid: bool = False
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        size = self.img_size
        pair = (size, size) if isinstance(size, int) else tuple(size)
        object.__setattr__(self, "img_size", pair)
        check_finite("model.", self)
        self._check_sizes()
        self._check_choices()

    def _check_sizes(self) -> None:
        height, width = self.image_hw
        check_limits(self)
        check_range("model.mlp_ratio", self.mlp_ratio, above=0, at_most=LIMITS["mlp_ratio"])
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            check_range(f"model.{name}", getattr(self, name), at_least=1)
        for name in ("num_classes", "reg_tokens"):
            check_range(f"model.{name}", getattr(self, name), at_least=0)
        remainder = height % self.patch_size or width % self.patch_size
        if min(height, width) < self.patch_size or (remainder and not self.floor_grid):
            smaller = max(self.patch_size, min(height, width) // self.patch_size * self.patch_size)
            raise ConfigError(
                f"model.img_size must be divisible by model.patch_size; got {_hw(height, width)} and "
                f"{self.patch_size}. Use model.img_size {smaller} or {smaller + self.patch_size}, or another "
                "patch size."
            )
        if self.embed_dim % self.num_heads:
            fits = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0]
            near = min(fits, key=lambda n: abs(n - self.num_heads))
            raise ConfigError(
                f"model.num_heads must divide model.embed_dim; got {self.num_heads} heads and width "
                f"{self.embed_dim}. The nearest number of heads that does is {near}."
            )

    def _check_choices(self) -> None:
        for name, choices in (
            ("pos_embed", POS_EMBEDS),
            ("act", ACTIVATIONS),
            ("mlp", MLPS),
            ("class_position", CLASS_POSITIONS),
        ):
            check_choice(f"model.{name}", getattr(self, name), choices)
        if self.mlp == "swiglu_packed" and self.mlp_dim % 2:
            raise ConfigError(
                f"model.mlp swiglu_packed needs an even hidden width; got {self.mlp_dim}. Change "
                "model.mlp_ratio."
            )
        if self.pos_embed == "sincos2d" and self.embed_dim % 4:
            raise ConfigError(
                f"model.pos_embed sincos2d needs model.embed_dim divisible by 4; got {self.embed_dim}."
            )
        for name in ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            check_range(f"model.{name}", getattr(self, name), at_least=0, below=1)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width, in pixels."""
        assert isinstance(self.img_size, tuple)
        return self.img_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def layout(self) -> TokenLayout:
        """Where each kind of token stands."""
        count = num_class_tokens(self.pool, self.num_classes)
        return TokenLayout(self.class_token, self.reg_tokens, self.grid_size, count)

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` and JSON take back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """Rebuild a config from `to_dict`, after JSON or not; ConfigError for an unknown or bad setting."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"unknown architecture setting `{unknown[0]}`.{did_you_mean(unknown[0], known)} "
                f"Known: {', '.join(sorted(known))}."
            )
        return cls(**values)


def check_limits(config: ModelConfig) -> None:
    """Refuse (ConfigError) sizes beyond `LIMITS`."""
    for name in ("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "reg_tokens"):
        check_range(f"model.{name}", getattr(config, name), at_most=LIMITS[name])
    height, width = config.image_hw
    check_range("model.img_size", max(height, width), at_most=LIMITS["img_size"])
    patches = (height // max(1, config.patch_size)) * (width // max(1, config.patch_size))
    if patches > LIMITS["patches"]:
        raise ConfigError(
            f"model.img_size {_hw(height, width)} in patches of model.patch_size {config.patch_size} makes "
            f"{patches} tokens; at most {LIMITS['patches']} are possible. Use larger patches."
        )


def _hw(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"
