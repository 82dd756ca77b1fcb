"""Models of timm that native blocks do not cover, behind the interface of `TokenModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from vit_cls.checks import check_range
from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.block import DropPath
from vit_cls.model.config import ViTConfig, check_limits
from vit_cls.model.pooling import make_pooling, needs_class_token, num_class_tokens
from vit_cls.model.pooling_base import Pooling, PoolingContext
from vit_cls.model.token_model import TokenModel
from vit_cls.model.tokens import TokenLayout
from vit_cls.weights.metadata import check_timm_arguments
from vit_cls.weights.timm_models import (
    activation_name,
    make_timm,
    module_of,
    native_config,
    placement,
    skeleton,
)

OWN_MODULES = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
"""What the adapter holds itself; every other key belongs to timm's encoder."""

_OWN_FIELDS = (
    *("pool", "num_classes", "img_size", "patch_size", "in_chans"),
    *("fc_norm", "pool_include_prefix", "drop_rate"),
)
"""Fields of `AdapterConfig` that a user may change; other settings are arguments of timm's constructor."""


@dataclass(frozen=True)
class AdapterConfig:
    """Architecture of an adapted model: timm's name, and what is ours to choose; see also `ViTConfig`.

    Args:
        timm_architecture: Without a tag.
        pool: As for a native model; also ``distilled``: class and distillation token, each with its own head,
            logits averaged.
        reg_tokens: The distillation token counts as one.
        fc_norm: Whether the final norm stands after pooling; None follows timm's constructor.
        arguments: Further arguments of timm's constructor.
    """

    timm_architecture: str
    pool: str
    num_classes: int
    img_size: tuple[int, int]
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    class_token: bool
    reg_tokens: int
    no_embed_class: bool
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    drop_rate: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", tuple(self.img_size))
        check_limits(self)
        check_range("model.patch_size", self.patch_size, at_least=1)
        check_timm_arguments(self.arguments, f"the setting of {self.timm_architecture}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width, in pixels."""
        return self.img_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch rows and columns."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` and JSON take back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Rebuild a config from `to_dict`, after JSON or not; ConfigError where a field is unknown."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := [name for name in values if name not in known]:
            raise ConfigError(
                f"unknown architecture setting `{unknown[0]}`.{did_you_mean(unknown[0], known)}"
            )
        return cls(**values)


def timm_config(name: str, model: Any, **arguments: Any) -> ViTConfig | AdapterConfig:
    """The architecture of timm's model, or skeleton, built with these arguments; native where it can be."""
    return native_config(model) or adapter_config(name.partition(".")[0], model, **arguments)


def adapter_config(name: str, model: Any, **arguments: Any) -> AdapterConfig:
    """The architecture of an adapted model, read off timm's, which was built with these arguments."""
    place = placement(model)
    distilled = isinstance(model, VisionTransformerDistilled)
    reg_token = getattr(model, "reg_token", None)
    blocks: list[Any] = list(model.blocks)
    return AdapterConfig(
        name,
        pool=place.pool,
        num_classes=model.num_classes,
        img_size=tuple(model.patch_embed.img_size),
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.in_chans,
        embed_dim=model.embed_dim,
        depth=len(blocks),
        num_heads=_num_heads(blocks[0]),
        class_token=model.cls_token is not None,
        reg_tokens=int(distilled) + (0 if reg_token is None else reg_token.shape[1]),
        no_embed_class=bool(getattr(model, "no_embed_class", False)),
        fc_norm=place.fc_norm,
        pool_include_prefix=place.include_prefix,
        arguments=arguments,
    )


def changed_adapter(config: AdapterConfig, changes: Mapping[str, Any]) -> AdapterConfig:
    """An adapted architecture with fields or arguments of timm's constructor changed, or ConfigError."""
    name = config.timm_architecture
    own = {key: value for key, value in changes.items() if key in _OWN_FIELDS}
    if isinstance(own.get("img_size"), int):
        own["img_size"] = (own["img_size"], own["img_size"])
    arguments = {key: value for key, value in changes.items() if key not in _OWN_FIELDS}
    if module_of(name) == "eva" and "reg_tokens" in arguments:
        arguments["num_reg_tokens"] = arguments.pop("reg_tokens")
    config = dataclasses.replace(config, **own)
    if any(side % config.patch_size for side in config.img_size):
        height, width = config.img_size
        raise ConfigError(
            f"model.img_size must be divisible by model.patch_size; got {height}x{width} and "
            f"{config.patch_size}."
        )
    if not arguments:
        return config
    if {"class_token", "reg_tokens", "no_embed_class"} & changes.keys():
        if config.pool == "distilled" or module_of(name) == "beit":
            raise ConfigError(
                f"{name} has its tokens built in: class_token, reg_tokens and no_embed_class cannot be "
                "changed."
            )
        place = dataclasses.replace(config, class_token=changes.get("class_token", config.class_token))
        if not place.class_token and needs_class_token(config.pool):
            raise ConfigError("model.class_token is false, but model.pool reads it. Use model.pool gap.")
    merged = {**config.arguments, **arguments}
    # timm's constructor refuses its own pooling without a class token; ours is set here in any case.
    native = {"global_pool": "avg"} if merged.get("class_token") is False else {}
    built = adapter_config(name, skeleton(name, **merged, **native), **merged, **native)
    kept = {key: getattr(config, key) for key in _OWN_FIELDS}
    return dataclasses.replace(built, **kept)


def _num_heads(block: Any) -> int:
    """Parallel blocks hold their heads themselves, or in a list of attentions."""
    holders = [block, *block.modules()]
    return next(int(m.num_heads) for m in holders if hasattr(m, "num_heads"))


class DistilledPool(Pooling):
    """Class and distillation token, averaged. Source: DeiT, https://arxiv.org/abs/2012.12877, section 4."""

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.read = slice(0, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.mean(dim=1)


class TimmAdapter(TokenModel):
    """A model of timm with its pooling, final norm and head taken over by ours; keys and numbers are timm's.

    ConfigError if timm refuses the settings, or the pooling does not fit the tokens.
    """

    config: AdapterConfig
    body: Any
    head_dist: nn.Module | None

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        arguments = dict(config.arguments)
        if module_of(config.timm_architecture) != "beit":
            arguments["dynamic_img_size"] = False  # one size, and patch tokens in one row
        body: Any = make_timm(
            config.timm_architecture,
            img_size=config.img_size,
            in_chans=config.in_chans,
            num_classes=0,
            patch_size=config.patch_size,
            **arguments,
        )
        self._embed, self._arguments = next(steps for kind, steps in _STEPS.items() if isinstance(body, kind))
        self.layout = TokenLayout(config.class_token, config.reg_tokens, config.grid_size)
        if config.pool != "distilled" and num_class_tokens(config.pool, config.num_classes) != 1:
            raise ConfigError(
                f"model.pool {config.pool} needs several class tokens; "
                f"{config.timm_architecture} has its tokens built in. Use another pooling, or a plain ViT."
            )
        if (body.embed_dim, len(body.blocks)) != (config.embed_dim, config.depth):
            raise ConfigError(
                f"timm's {config.timm_architecture} with these settings has {len(body.blocks)} blocks of "
                f"width {body.embed_dim}, not {config.depth} of {config.embed_dim}."
            )
        self.body = body
        _use_own_drop_path(body)
        dim = config.embed_dim
        context = self.pooling_context = _pooling_context(body, self.layout, config)
        pooling = DistilledPool(context) if config.pool == "distilled" else make_pooling(config.pool, context)
        if config.pool == "distilled" and not isinstance(body, VisionTransformerDistilled):
            raise ConfigError("model.pool distilled needs a distilled DeiT; use cls or gap.")
        norm_after = pooling.norm_after if config.fc_norm is None else config.fc_norm
        norms = [norm for norm in (body.norm, body.fc_norm) if not isinstance(norm, nn.Identity)]
        norm = norms[0] if norms else nn.Identity()
        self.norm = nn.Identity() if norm_after else norm
        self.attn_pool = pooling
        self.fc_norm = norm if norm_after else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = _make_head(pooling.out_dim, config.num_classes)
        self.head_dist = _make_head(dim, config.num_classes) if config.pool == "distilled" else None
        body.norm = body.fc_norm = body.head = nn.Identity()
        if isinstance(body, VisionTransformerDistilled):
            body.head_dist = nn.Identity()
        body.attn_pool = None
        self.register_state_dict_post_hook(_to_timm_keys)
        self.register_load_state_dict_pre_hook(_from_timm_keys)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:  # type: ignore[override]
        """timm's blocks."""
        return self.body.blocks

    @property
    def patch_embed(self) -> nn.Module:
        """Images to patch tokens, shape ``(batch, patches, dim)``."""
        return self.body.patch_embed

    def embed_tokens(self, images: Tensor) -> Tensor:
        """See `TokenModel.embed_tokens`."""
        expected = (self.config.in_chans, *self.config.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape (batch, {', '.join(map(str, expected))}); got "
                f"{tuple(images.shape)}. Resize them, or build the model with another img_size."
            )
        return self._embed(self.body, images)

    def run_blocks(self, tokens: Tensor, read: slice | None = None, num_layers: int = 1) -> Tensor:
        """See `TokenModel.run_blocks`; every token is computed, the read ones are returned."""
        kept: list[Tensor] = []
        first_kept = len(self.blocks) - num_layers
        for i, (block, arguments) in enumerate(zip(self.blocks, self._arguments(self.body), strict=True)):
            tokens = self.call_block(block, tokens, **arguments)
            if i >= first_kept:
                kept.append(tokens if read is None else tokens[:, read])
        return torch.cat(kept, dim=1) if len(kept) > 1 else kept[0]

    def forward(self, images: Tensor) -> Tensor:
        """See `TokenModel.forward`."""
        if self.head_dist is None:
            return super().forward(images)
        tokens = self.head_drop(self.norm(self.run_blocks(self.embed_tokens(images), self.pool.read)))
        return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2


def _use_own_drop_path(body: nn.Module) -> None:
    """Ours draws the same numbers as timm's, and blocks with different rates share a compiled graph."""
    for module in list(body.modules()):
        for name, child in module.named_children():
            if isinstance(child, TimmDropPath):
                setattr(module, name, DropPath(child.drop_prob))


def _make_head(dim: int, num_classes: int) -> nn.Module:
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _pooling_context(body: Any, layout: TokenLayout, config: AdapterConfig) -> PoolingContext:
    """The settings of timm's own attention pooling where it has one, else those of a plain ViT."""
    settings: dict[str, Any] = {"num_heads": config.num_heads, "mlp_dim": 4 * config.embed_dim}
    theirs = getattr(body, "attn_pool", None)
    if theirs is not None:
        settings = {
            "num_heads": theirs.num_heads,
            "mlp_dim": theirs.mlp.fc1.out_features,
            "norm_eps": theirs.norm.eps,
            "act": activation_name(theirs.mlp.act),
        }
    return PoolingContext(
        layout,
        embed_dim=config.embed_dim,
        include_prefix=config.pool_include_prefix,
        depth=config.depth,
        num_classes=config.num_classes,
        **settings,
    )


def _to_timm_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    inner = f"{prefix}body."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _from_timm_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.partition(".")[0] not in OWN_MODULES and not name.startswith("body."):
            state[f"{prefix}body.{name}"] = state.pop(key)


# ---- how models of timm turn images into tokens, and what they give their blocks beside them ---------------


def _embed_vit(body: Any, images: Tensor) -> Tensor:
    return body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(images))))


def _no_arguments(body: Any) -> list[dict[str, Any]]:
    return [{}] * len(body.blocks)


def _embed_eva(body: Any, images: Tensor) -> Tensor:
    tokens, _ = body._pos_embed(body.patch_embed(images))
    return body.norm_pre(tokens)


def _eva_arguments(body: Any) -> list[dict[str, Any]]:
    rope = body.rope
    if rope is not None:
        known = getattr(rope, "feat_shape", None) is not None
        rope = rope.get_embed() if known else rope.get_embed(shape=body.patch_embed.grid_size)
    ropes = rope if body.rope_mixed and rope is not None else [rope] * len(body.blocks)
    return [{"rope": rope} for rope in ropes]


def _embed_beit(body: Any, images: Tensor) -> Tensor:
    patches = body.patch_embed(images)
    tokens = torch.cat([body.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return body.pos_drop(tokens if body.pos_embed is None else tokens + body.pos_embed)


def _beit_arguments(body: Any) -> list[dict[str, Any]]:
    bias = None if body.rel_pos_bias is None else body.rel_pos_bias()
    return [{"shared_rel_pos_bias": bias}] * len(body.blocks)


# timm's class: (images to tokens, what each block is given beside its tokens)
_STEPS: dict[type, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], list[dict[str, Any]]]]] = {
    TimmViT: (_embed_vit, _no_arguments),
    Eva: (_embed_eva, _eva_arguments),
    Beit: (_embed_beit, _beit_arguments),
}
