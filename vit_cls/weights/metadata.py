"""The schema of what a model file says besides its tensors: names, types and limits, checked once.

A model file is somebody else's: nothing that it says may choose what is opened, fetched, imported or run,
and no number in it may ask for memory that its tensors do not have.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import CROP_MODES, INTERPOLATIONS
from vit_cls.model.config import ACTIVATIONS, LIMITS, MLPS, POS_EMBEDS
from vit_cls.model.tokens import CLASS_POSITIONS

MAX_JSON_BYTES = 100_000_000
"""As safetensors has it for its header."""
MAX_TEXT = 10_000

Check = Callable[[Any], str | None]
"""Gives None, or what a value must be."""


# ---- what a value must be ---------------------------------------------------------------------------------


def _must(fits: Callable[[Any], bool], words: str) -> Check:
    return lambda value: None if fits(value) else words


def whole(low: int, high: int) -> Check:
    """An integer in a range; true and false are none."""
    return _must(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Check:
    """A finite number in a range."""
    return _must(lambda v: type(v) in (int, float) and low <= v <= high, f"a number from {low:g} to {high:g}")


def positive(high: float) -> Check:
    """A finite number above 0."""
    words = f"a number above 0, at most {high:g}"
    return _must(lambda v: type(v) in (int, float) and 0 < v <= high, words)


def _can_be_written(text: str) -> bool:
    """Whether a file can hold it: bytes of names that are not UTF-8 count, half characters do not."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


_flag = _must(lambda v: isinstance(v, bool), "true or false")
_text = _must(
    lambda v: isinstance(v, str) and len(v) <= MAX_TEXT and _can_be_written(v),
    f"a text of at most {MAX_TEXT} characters",
)
_pooling = _must(lambda v: isinstance(v, str) and len(v) <= 300, "a text of at most 300 characters")
_anything = _must(lambda v: True, "")


def one_of(words: Collection[str]) -> Check:
    """One of some words."""
    return _must(lambda v: isinstance(v, str) and v in words, f"one of {', '.join(words)}")


def maybe(check: Check) -> Check:
    """Null, or what another check takes."""
    return either(_must(lambda v: v is None, "null"), check)


def either(*checks: Check) -> Check:
    """What one of several checks takes."""

    def first(value: Any) -> str | None:
        required = [check(value) for check in checks]
        return None if None in required else " or ".join(filter(None, required))

    return first


def row(check: Check, *, length: int | None = None, most: int = LIMITS["num_classes"]) -> Check:
    """A list, each of whose items another check takes; a text is none."""
    words = f"a list of {f'at most {most}' if length is None else length} values"
    low, high = (0, most) if length is None else (length, length)

    def each(value: Any) -> str | None:
        if not isinstance(value, (list, tuple)) or not low <= len(value) <= high:
            return words
        required = next((needed for item in value if (needed := check(item)) is not None), None)
        return None if required is None else f"{words}, each {required}"

    return each


def _limit(name: str, low: int = 1) -> Check:
    return whole(low, LIMITS[name])


# ---- the schema -------------------------------------------------------------------------------------------

_SIDES = row(_limit("img_size"), length=2)
_RATIO = positive(LIMITS["mlp_ratio"])
_RATE = number(0, 0.999_999_999)
_SMALL = number(-1e6, 1e6)
_COMMON: dict[str, Check] = {
    "patch_size": _limit("patch_size"),
    "in_chans": _limit("in_chans"),
    "num_classes": _limit("num_classes", 0),
    "embed_dim": _limit("embed_dim"),
    "depth": _limit("depth"),
    "num_heads": _limit("num_heads"),
    "class_token": _flag,
    "reg_tokens": _limit("reg_tokens", 0),
    "no_embed_class": _flag,
    "fc_norm": maybe(_flag),
    "pool_include_prefix": _flag,
    "drop_rate": _RATE,
}
"""Fields of `ViTConfig` and `AdapterConfig`, and arguments of timm's constructors."""

NATIVE: dict[str, Check] = {
    **_COMMON,
    "img_size": either(_SIDES, _limit("img_size")),
    "pool": _pooling,
    "mlp_ratio": _RATIO,
    "qkv_bias": _flag,
    "qk_norm": _flag,
    "init_values": maybe(_SMALL),
    "pos_embed": one_of(POS_EMBEDS),
    "pre_norm": _flag,
    "final_norm": _flag,
    "norm_eps": number(0, 1),
    "act": one_of(ACTIVATIONS),
    "mlp": one_of(MLPS),
    "causal": _flag,
    "class_position": one_of(CLASS_POSITIONS),
    "floor_grid": _flag,
    **dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), _RATE),
}
"""Fields of `ViTConfig`."""

_FLAGS = (
    *("qkv_bias", "qkv_fused", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "scale_mlp", "proj_bias"),
    *("pre_norm", "final_norm", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
    *("swiglu_mlp", "scale_attn_inner", "attn_only_layer_scale", "use_abs_pos_emb", "use_rot_pos_emb"),
    *("rope_rotate_half", "use_post_norm", "use_pre_transformer_norm", "use_post_transformer_norm"),
    *("use_fc_norm", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
)
_RATES = ("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_NUMBERS = (
    *("init_values", "rope_temperature", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
    *("rope_grid_offset", "head_init_scale"),
)
_NAMES = (
    *("global_pool", "pos_embed", "weight_init", "attn_type", "rope_type", "rope_grid_indexing"),
    *("act_layer", "norm_layer", "embed_norm_layer"),
)
_GRID = either(_SIDES, _limit("img_size"))


# Of timm's own tables: no path, no address, no module.
_name = _must(lambda v: isinstance(v, str) and v.isidentifier() and len(v) <= 100, "a word")

TIMM_ARGUMENTS: dict[str, Check] = {
    **_COMMON,
    "img_size": maybe(_GRID),
    "ref_feat_shape": maybe(_GRID),
    "rope_mrope_section": maybe(row(whole(0, LIMITS["embed_dim"]), most=8)),
    "num_reg_tokens": _limit("reg_tokens", 0),
    "num_kv_heads": maybe(_limit("num_heads")),
    "attn_pool_num_heads": maybe(_limit("num_heads")),
    "swiglu_align_to": _limit("embed_dim", 0),
    "mlp_ratio": _RATIO,
    "attn_pool_mlp_ratio": maybe(_RATIO),
    **dict.fromkeys(_FLAGS, maybe(_flag)),
    **dict.fromkeys(_RATES, _RATE),
    **dict.fromkeys(_NUMBERS, maybe(_SMALL)),
    **dict.fromkeys(_NAMES, maybe(_name)),
    "use_naflex": _must(lambda v: v is False, "false"),
}
"""Arguments of timm's constructors that a file may name: the shape of a model and nothing else.

Not among them is whatever opens a file or a connection (``checkpoint_path``, ``pretrained``,
``pretrained_cfg``, ``pretrained_cfg_overlay``, ``cache_dir``), places tensors (``device``, ``dtype``) or is a
function.
"""


def check_timm_arguments(values: Any, where: str = "arguments") -> None:
    """Refuse (ConfigError) an argument for timm that is not in `TIMM_ARGUMENTS`, or its value."""
    _check(values, TIMM_ARGUMENTS, where)


ADAPTED: dict[str, Check] = {
    **_COMMON,
    "timm_architecture": _name,
    "pool": _pooling,
    "img_size": _SIDES,
    "arguments": _anything,  # by `TIMM_ARGUMENTS`
}
"""Fields of `AdapterConfig`."""
_OPTIONAL = ("fc_norm", "pool_include_prefix", "drop_rate", "arguments")

_CHANNELS = row(_SMALL, most=LIMITS["in_chans"])
PREPROCESS: dict[str, Check] = {
    "img_size": _SIDES,
    "mean": _CHANNELS,
    "std": row(positive(1e6), most=LIMITS["in_chans"]),
    "crop_pct": positive(1),
    "crop_mode": one_of(CROP_MODES),
    "interpolation": one_of(INTERPOLATIONS),
    "background": row(whole(0, 255), length=3),
}
"""Fields of `Preprocess`."""

FIELDS: dict[str, Check] = {
    "format_version": whole(1, 10**6),
    "architecture": _anything,  # by `NATIVE` or `ADAPTED`
    "preprocess": _anything,  # by `PREPROCESS`
    "class_names": row(_text),
    "temperature": positive(1e12),
    "weights_licence": maybe(_text),
    "weights_source": maybe(_text),
    "own_poolings": _anything,
    "kept": one_of(("raw", "ema")),
}
"""What the metadata of a model file says that is used; more is passed over."""
_REQUIRED = ("architecture", "preprocess", "class_names")

TIMM_RECORD: dict[str, Check] = {
    "input_size": row(_limit("img_size"), length=3),
    "fixed_input_size": _flag,
    "interpolation": one_of(INTERPOLATIONS),
    "crop_pct": positive(1),
    "crop_mode": one_of(CROP_MODES),
    "mean": _CHANNELS,
    "std": PREPROCESS["std"],
    "num_classes": _limit("num_classes", 0),
    "label_names": maybe(row(_text)),
    "license": maybe(_text),
    "tag": maybe(_text),
    "architecture": maybe(_name),
}
"""What a ``config.json`` for timm says in ``pretrained_cfg`` that is used; more is passed over."""


def read_json(path: Path) -> Any:
    """`parse_json` of a file; OSError if it cannot be read."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))


def parse_json(source: str | bytes) -> Any:
    """JSON of somebody else's; ValueError for what is none, too long, too deep, or has an endless number."""
    if len(source) > MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(source)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def check_metadata(metadata: Any, path: Path) -> dict[str, Any]:
    """The metadata of a model file or a checkpoint of ours, or ModelFileError where they break the schema."""
    try:
        _check(metadata, FIELDS, "", required=_REQUIRED, strict=False)
        config = check_architecture(metadata["architecture"])
        _check_preprocess(metadata["preprocess"], config)
        names, count = metadata["class_names"], config.get("num_classes", len(metadata["class_names"]))
        if len(names) != count:
            raise ConfigError(f"the head has {count} outputs, but there are {len(names)} class names")
        if len(set(names)) != len(names):
            raise ConfigError("class_names must be unique")
        own = metadata.get("own_poolings", {})
        if not isinstance(own, dict) or any(map(_text, [*own, *own.values()])):
            raise ConfigError("own_poolings must be texts by name")
    except ConfigError as error:
        raise ModelFileError(f"{path} does not describe a model: {str(error).rstrip('.')}.") from error
    return dict(metadata)


def check_architecture(values: Any) -> Mapping[str, Any]:
    """Fields of `ViTConfig` or `AdapterConfig`, each of its type and within its limits, or ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"architecture must be settings by name; got {shown(values)}")
    if "timm_architecture" not in values:
        _check(values, NATIVE, "architecture", strict=False)  # `ViTConfig.from_dict` knows its fields
        return values
    required = [name for name in ADAPTED if name not in _OPTIONAL]
    _check(values, ADAPTED, "architecture", required=required, strict=False)
    check_timm_arguments(values.get("arguments", {}), "architecture.arguments")
    return values


def _check_preprocess(values: Any, architecture: Mapping[str, Any]) -> None:
    _check(values, PREPROCESS, "preprocess", required=("img_size",))
    size, channels = architecture.get("img_size", 224), architecture.get("in_chans", 3)
    taken = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(values["img_size"]) != taken:
        raise ConfigError(f"preprocess makes {values['img_size']} pixels, but the model takes {list(taken)}")
    for name in ("mean", "std"):
        if len(values.get(name, "RGB")) != channels:
            raise ConfigError(
                f"preprocess.{name} has {len(values.get(name, 'RGB'))} values, but the model takes "
                f"{channels} channels"
            )


def check_timm_settings(settings: Any) -> None:
    """The ``config.json`` of a folder for timm, or ConfigError: what is not allowed is not passed on."""
    if not isinstance(settings, dict):
        raise ConfigError("it must be settings by name")
    record = settings.get("pretrained_cfg", settings)
    _check(record, TIMM_RECORD, "pretrained_cfg" if record is not settings else "", strict=False)
    overrides = {name: settings[name] for name in ("num_classes", "label_names") if name in settings}
    _check(overrides, TIMM_RECORD, "")
    check_timm_arguments(settings.get("model_args") or {}, "model_args")


def _check(
    values: Any,
    schema: Mapping[str, Check],
    where: str,
    *,
    required: Collection[str] = (),
    strict: bool = True,
) -> None:
    """ConfigError for the first value that is missing, not what it must be, or if ``strict`` unknown."""
    name = where or "the metadata"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be settings by name; got {shown(values)}")
    if missing := [key for key in required if key not in values]:
        raise ConfigError(f"{name} must have {', '.join(missing)}")
    for key, value in values.items():
        if key not in schema:
            if strict:
                raise ConfigError(f"{name} has the setting {shown(key)}, which is not allowed there")
            continue
        must_be = schema[key](value)
        if must_be is not None:
            place = f"{where}.{key}" if where else key
            raise ConfigError(f"{place} must be {must_be}; got {shown(value)}")


def shown(value: Any) -> str:
    """A value of somebody else's for a message: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # a number of too many digits, say
        return f"a value of type {type(value).__name__}"
