"""timm's plain ViTs and their relatives: which there are, what each is, and a skeleton of any of them."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import AttentionPoolLatent, GluMlp
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models import beit as timm_beit
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.classifier import CROP_MODES, INTERPOLATIONS, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.init import SkipInit
from vit_cls.weights.metadata import check_timm_arguments, shown

MODULES = ("vision_transformer", "deit", "eva", "beit")
"""The modules of timm whose models can be loaded."""

POOLS = {"token": "cls", "avg": "gap", "max": "max", "avgmax": "avgmax", "map": "map"}
"""timm's ``global_pool`` in our words."""

NORM_AFTER = ("gap", "max", "avgmax")
"""Those of `POOLS` after which timm's plain ViT has its final norm, unless told otherwise."""

QUICK_GELU_NOTE = "natively QuickGELU"
"""How timm marks tags whose weights were trained with QuickGELU, on an architecture without it."""

OTHERWISE_IN_TIMM = ("img_size", "pos_embed")
SAME_IN_TIMM = tuple(
    field.name
    for field in dataclasses.fields(ViTConfig)
    if field.name in inspect.signature(timm_vit.VisionTransformer).parameters
    and field.name not in OTHERWISE_IN_TIMM
    and not field.name.endswith("_rate")
)
"""Settings that timm's constructor spells as `ViTConfig` does; rates of dropout are no architecture."""

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


FOLDER = "local-dir:"
"""How timm names a folder; its settings pass `check_timm_settings` first."""
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What timm's constructors raise for values that do not fit."""


def make_timm(name: str, **arguments: Any) -> Any:
    """timm's model of that name, with a tag or without, with fresh weights.

    Args:
        arguments: Of timm's constructor; ConfigError if it refuses them, or they are not in `TIMM_ARGUMENTS`.
    """
    if module_of(name) in ("vision_transformer", "eva"):
        # An environment variable of timm's may reroute these to another class, with other keys.
        arguments.setdefault("use_naflex", False)
    if not name.startswith(FOLDER) and module_of(name.partition(".")[0]) is None:
        raise ConfigError(f"{name!r} is not one of timm's architectures that are supported.")
    settings = {key: value for key, value in arguments.items() if key != "use_naflex"}
    try:
        check_timm_arguments(settings)
        return timm.create_model(name, **arguments)
    except _REFUSALS as error:
        given = ", ".join(f"{k}={shown(v)}" for k, v in settings.items())
        raise ConfigError(f"timm's {name} cannot be built with {given}: {error}.") from error


def skeleton(name: str, **arguments: Any) -> Any:
    """timm's model of that name without memory for its weights: shapes and settings alone.

    Args:
        arguments: Of timm's constructor; ConfigError if it refuses them.

    Example:
        >>> skeleton("vit_tiny_patch16_224").pos_embed.shape
        torch.Size([1, 197, 192])
    """
    with torch.device("meta"), SkipInit():
        return make_timm(name, **arguments)


@functools.cache
def architectures() -> tuple[str, ...]:
    """Every architecture that can be loaded, in timm's order of modules and names."""
    return tuple(name for module in MODULES for name in timm.list_models(module=module))


@functools.cache
def tags() -> tuple[str, ...]:
    """Every ``architecture.tag`` with published weights."""
    return tuple(
        name
        for module in MODULES
        for name in timm.list_models(module=module, pretrained=True, include_tags=True)
    )


@functools.cache
def module_of(name: str) -> str | None:
    """The module of timm that an architecture is in, or None where it is in none of `MODULES`."""
    return next((module for module in MODULES if name in timm.list_models(module=module)), None)


def is_timm_name(name: str) -> bool:
    """Whether ``architecture`` or ``architecture.tag`` is one of timm's that can be loaded."""
    base = name.partition(".")[0]
    return module_of(base) is not None and (name == base or _record(name) is not None)


def _record(name: str) -> PretrainedCfg | None:
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag of a known architecture
        return None


def pretrained_config(name: str) -> PretrainedCfg:
    """timm's record of ``architecture.tag``, or of its default tag; ConfigError gives near names."""
    base, _, tag = name.partition(".")
    if module_of(base) is None:
        if timm.is_model(base) and base in timm.list_models():
            raise ConfigError(
                f"model.name {name!r} is an architecture of timm, but not a Vision Transformer that is "
                f"supported; those are in timm's modules {', '.join(MODULES)}. `vit-cls models` lists them."
            )
        raise ConfigError(
            f"model.name {name!r} is not a known architecture.{did_you_mean(base, architectures())} "
            "`vit-cls models` lists them all."
        )
    config = _record(name)
    if config is None:
        known = [known.partition(".")[2] for known in tags() if known.partition(".")[0] == base]
        has = f"It has {', '.join(known)}." if known else "No weights were published for it."
        raise ConfigError(f"{base} has no tag {tag!r}.{did_you_mean(tag, known)} {has}")
    return config


def preprocess_of(config: PretrainedCfg) -> Preprocess:
    """How a tag wants its images."""
    assert config.crop_mode in CROP_MODES
    assert config.interpolation in INTERPOLATIONS
    return Preprocess(
        img_size=(config.input_size[1], config.input_size[2]),
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
        interpolation=config.interpolation,
    )


def matching(pattern: str) -> list[str]:
    """Architectures that match a name or a pattern (``*clip*``), or have a tag that does (``*.openai``)."""
    if "." in pattern:
        return list(dict.fromkeys(name.partition(".")[0] for name in fnmatch.filter(tags(), pattern)))
    return fnmatch.filter(architectures(), pattern)


def filter_of(name: str) -> Callable[[dict[str, Tensor], Any], dict[str, Tensor]]:
    """timm's function that brings a foreign checkpoint into timm's keys and the model's grid.

    timm chooses it inside the constructors of these modules, out of reach; the choice is repeated here.
    For a name that is none of timm's, an empty one too, it is that of plain Vision Transformers.
    """
    module = module_of(name)
    if module == "eva":
        return timm_eva.checkpoint_filter_fn
    if module == "beit":
        return timm_beit.checkpoint_filter_fn
    if module == "deit":
        return functools.partial(timm_vit.checkpoint_filter_fn, adapt_layer_scale=True)
    if "radio" in name:
        corners = any(part in name for part in ("base_patch16_radio_v3", "huge_patch16_radio_v3"))
        return functools.partial(
            timm_vit.checkpoint_filter_fn, interpolation="bilinear", antialias=False, align_corners=corners
        )
    if "flexi" in name:
        return functools.partial(timm_vit.checkpoint_filter_fn, interpolation="bilinear", antialias=False)
    return timm_vit.checkpoint_filter_fn


@dataclass(frozen=True)
class Placement:
    """What a model of timm does with its tokens at the end."""

    pool: str  # in our words
    fc_norm: bool | None  # None: where the name of the pooling implies it
    final_norm: bool
    include_prefix: bool  # in a pooling over the patches


def placement(model: Any) -> Placement:
    """Read pooling and norm off a model of timm, or a skeleton; ConfigError for a pooling unknown here."""
    if model.global_pool not in POOLS:
        raise ConfigError(f"timm's pooling {model.global_pool!r} has no counterpart here.")
    pool = "distilled" if isinstance(model, VisionTransformerDistilled) else POOLS[model.global_pool]
    after, before = (not isinstance(norm, nn.Identity) for norm in (model.fc_norm, model.norm))
    implied = pool in NORM_AFTER
    # Eva's pooling by attention reads the class token too; timm's plain ViT has a setting for it.
    prefix = bool(getattr(model, "pool_include_prefix", False))
    prefix |= isinstance(model, timm_eva.Eva) and pool == "map"
    return Placement(pool, after if (after or before) and after != implied else None, after or before, prefix)


def native_config(model: Any) -> ViTConfig | None:
    """The native architecture that computes what a model of timm computes, with the same keys.

    It is read off the built model, of which a skeleton will do, and not off the constructor's arguments:
    those may be partials of anything. None where a part has no native counterpart: the adapter runs it.
    """
    if type(model) is not timm_vit.VisionTransformer:
        return None
    blocks: list[Any] = list(model.blocks)
    block = blocks[0]
    if any(type(b) is not timm_vit.Block or type(b.attn) is not timm_vit.Attention for b in blocks):
        return None
    swiglu = type(block.mlp) is GluMlp and not block.mlp.gate_last
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    plain = [
        swiglu or type(block.mlp) is timm_vit.Mlp,
        bool(norms) and len({norm.eps for norm in norms}) == 1,
        isinstance(block.norm1, nn.LayerNorm),
        all(isinstance(part.norm, nn.Identity) for part in (block.attn, block.mlp, model.patch_embed)),
        block.attn.proj.bias is not None,
        model.attn_pool is None or type(model.attn_pool) is AttentionPoolLatent,
        model.global_pool in POOLS,
        type(block.mlp.act).__name__ in _ACTIVATIONS,
    ]
    if not all(plain):
        return None
    dim = model.embed_dim
    place = placement(model)
    return ViTConfig(
        img_size=tuple(model.patch_embed.img_size),
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        pool=place.pool,
        embed_dim=dim,
        depth=len(blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=ratio_of(block.mlp.fc1.out_features, dim),
        qkv_bias=block.attn.qkv.bias is not None,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        init_values=None if isinstance(block.ls1, nn.Identity) else block.ls1.init_values,
        class_token=model.cls_token is not None,
        reg_tokens=model.num_reg_tokens,
        no_embed_class=model.no_embed_class,
        pos_embed="none" if model.pos_embed is None else "learn",
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        final_norm=place.final_norm,
        fc_norm=place.fc_norm,
        norm_eps=norms[0].eps,
        act=activation_name(block.mlp.act),
        mlp="swiglu_packed" if swiglu else "mlp",
        pool_include_prefix=place.include_prefix,
        floor_grid=any(side % model.patch_embed.patch_size[0] for side in model.patch_embed.img_size),
    )


def activation_name(module: nn.Module) -> str:
    """Our name of an activation of timm's or torch's; ConfigError if it has none."""
    name = type(module).__name__
    if name not in _ACTIVATIONS:
        raise ConfigError(f"timm's activation {name} has no counterpart here.")
    approximate = getattr(module, "approximate", "none") == "tanh"
    return "gelu_tanh" if approximate else _ACTIVATIONS[name]


def ratio_of(hidden: int, dim: int) -> float:
    """The ratio of which ``int(dim * ratio)`` is ``hidden``; the plain quotient may round below it.

    Args:
        dim: Width of a token.
    """
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def timm_arguments(config: ViTConfig) -> dict[str, Any]:
    """A native architecture as arguments of timm's ``VisionTransformer``, all that JSON can hold.

    Without the kind of MLP and the epsilon of the norms, which belong to an architecture's name. ConfigError
    if timm has no counterpart of its pooling.
    """
    names = {ours: theirs for theirs, ours in POOLS.items()}
    if config.pool not in names:
        raise ConfigError(
            f"timm has no counterpart of model.pool {config.pool}; it knows {', '.join(names)}."
        )
    return {
        **{name: getattr(config, name) for name in SAME_IN_TIMM},
        "img_size": list(config.image_hw),
        "global_pool": names[config.pool],
        "pos_embed": "none" if config.pos_embed == "none" else "learn",
        "act_layer": config.act,
    }


def class_names_of(config: PretrainedCfg) -> list[str] | None:
    """WordNet ids or names of a tag's classes; None for no head, or outputs that are none (an embedding)."""
    if config.label_names:
        names = list(config.label_names)
        return names if len(set(names)) == len(names) == config.num_classes else None
    subset = infer_imagenet_subset(config.to_dict())
    return None if subset is None else list(_imagenet(subset).label_names())


@functools.cache
def class_aliases(class_name: str) -> tuple[str, ...]:
    """Other names of an ImageNet class, by its WordNet id: its lemmas, with spaces and with underscores.

    Example:
        >>> class_aliases("n01440764")
        ('tench', 'Tinca tinca', 'Tinca_tinca')
    """
    try:
        lemmas = _imagenet("imagenet-22k").label_name_to_description(class_name).split(", ")
    except KeyError:
        return ()
    return tuple(dict.fromkeys(form for lemma in lemmas for form in (lemma, lemma.replace(" ", "_"))))


@functools.cache
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)
