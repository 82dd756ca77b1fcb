"""A model folder of Hugging Face's transformers: architecture, weights under timm's names, classes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import Preprocess
from vit_cls.model.config import ModelConfig, ViTConfig
from vit_cls.weights.adapter import AdapterConfig
from vit_cls.weights.architecture import check_shapes
from vit_cls.weights.metadata import read_json
from vit_cls.weights.tensor_files import read_tensors
from vit_cls.weights.timm_models import ratio_of

MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")
"""``model_type`` of the configurations that can be read."""

_ACTS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}

_WRONG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What comes of values in a JSON file that are not what they should be."""

_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
# (pattern of transformers, as its files and, since version 5, its modules spell it; key of timm)
_RULES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.(?:register_tokens|distillation_token)", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_BLOCK + r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.(gate|up)_proj\.(\w+)", r"blocks.\1.mlp.\2.\3"),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
]
_JOINED = {".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."), ".mlp.fc1.": (".mlp.gate.", ".mlp.up.")}
"""Matrices that timm holds as one, by part of their name."""


@dataclass(frozen=True)
class HFModel:
    """What a folder of transformers holds.

    With registers each of them has a position (of zero) in ``stored``, and so has the class token; as timm
    writes it, in ``config``, none has.
    """

    config: ModelConfig
    stored: ModelConfig  # the architecture that the weights have
    state: dict[str, Tensor]  # under timm's names
    raw: dict[str, Tensor]  # before matrices were joined; unknown parts under the file's names
    preprocess: Preprocess
    class_names: list[str] | None  # None: only numbered, or no head
    licence: str | None  # of the README's header


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a model of transformers, of any kind."""
    try:
        return "model_type" in _read_json(path / "config.json", required=False)
    except ModelFileError:
        return False


def read_hf_folder(path: Path) -> HFModel:
    """Read ``config.json``, ``model.safetensors`` and, where there is one, ``preprocessor_config.json``.

    ModelFileError if one is missing or damaged, they disagree, or the model is of another kind.
    """
    file = path / "config.json"
    settings = _read_json(file)
    kind = settings.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelFileError(
            f"{path} holds a model of transformers of type {kind!r}; those that can be read are "
            f"{', '.join(MODEL_TYPES)}."
        )
    tensors, _ = read_tensors(path / "model.safetensors")
    try:
        raw = _renamed(tensors, kind)
        state = _timm_state(raw)
        config = _architecture(settings, state)
        registers = isinstance(config, ViTConfig) and config.no_embed_class
        stored = dataclasses.replace(config, no_embed_class=False) if registers else config
        check_shapes(stored, {key: tuple(tensor.shape) for key, tensor in state.items()})
    except _WRONG as error:
        missing = "it has no " if isinstance(error, KeyError) else ""
        reason = str(error).rstrip(".")
        raise ModelFileError(f"{file} does not describe the weights beside it: {missing}{reason}.") from error
    names = _class_names(settings, config.num_classes)
    return HFModel(config, stored, state, raw, _read_preprocess(path, config), names, _licence(path))


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        if required:
            raise ModelFileError(f"there is no {path}; a folder of transformers has one.") from None
        return {}
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


def _renamed(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    raw: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(f"{kind}.")
        rule = next((rule for rule in _RULES if re.fullmatch(rule[0], bare)), None)
        known = rule is not None and tensor.numel()  # no registers are stored as a tensor of none
        raw[re.sub(*rule, bare) if rule and known else name] = tensor
    if "head_dist.weight" in raw and "reg_token" in raw:  # timm's distilled architecture, which has two heads
        raw["dist_token"] = raw.pop("reg_token")
    if kind == "dinov2_with_registers" and {"pos_embed", "reg_token"} <= raw.keys():
        positions, registers = raw["pos_embed"], torch.zeros_like(raw["reg_token"])
        raw["pos_embed"] = torch.cat([positions[:, :1], registers, positions[:, 1:]], dim=1)
    return raw


def _timm_state(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = re.compile(
        r"(cls_token|reg_token|dist_token|pos_embed|(patch_embed|blocks|norm|head|head_dist)\..*)"
    )
    state = {name: tensor for name, tensor in raw.items() if known.fullmatch(name)}
    for whole, parts in _JOINED.items():
        for key in [key for key in state if parts[0] in key]:
            tensors = [state.pop(key.replace(parts[0], part), None) for part in parts]
            present = [tensor for tensor in tensors if tensor is not None]
            if len(present) == len(parts):  # a missing one shows later, as a key of the model without weights
                state[key.replace(parts[0], whole)] = torch.cat(present)
    return state


def _architecture(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> ViTConfig | AdapterConfig:
    kind, dim = settings["model_type"], settings["hidden_size"]
    dinov2 = kind.startswith("dinov2")
    head = state.get("head.weight")
    gated = bool(settings.get("use_swiglu_ffn"))
    hidden = settings.get("intermediate_size") or int(dim * settings.get("mlp_ratio", 4))
    if gated and "blocks.0.mlp.fc1.weight" in state:
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    act = settings.get("hidden_act", "gelu")
    if act not in _ACTS:
        raise ConfigError(f"hidden_act is {act!r}; those that can be read are {', '.join(_ACTS)}")
    registers = {"deit": 1, "dinov2_with_registers": settings.get("num_register_tokens", 4)}
    common: dict[str, Any] = {
        "img_size": _pair(settings.get("image_size")) or (224, 224),
        "patch_size": _side(settings.get("patch_size", 16)),
        "in_chans": settings.get("num_channels", 3),
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": dim,
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "class_token": True,
        "reg_tokens": registers.get(kind, 0),
        "no_embed_class": kind == "dinov2_with_registers",
    }
    block = {"mlp_ratio": ratio_of(hidden, dim), "qkv_bias": settings.get("qkv_bias", True)}
    if "head_dist.weight" in state:
        # Two heads are what timm's distilled architectures have; their epsilon (1e-6) differs from 1e-12 by
        # nothing that fp32 shows.
        arguments = {key: common[key] for key in ("embed_dim", "depth", "num_heads")}
        arguments |= {**block, "act_layer": _ACTS[act]}
        return AdapterConfig(
            "deit_base_distilled_patch16_224", pool="distilled", arguments=arguments, **common
        )
    return ViTConfig(
        pool="cls+gap" if dinov2 and head is not None else "cls",
        init_values=settings.get("layerscale_value", 1.0) if dinov2 else None,
        norm_eps=settings.get("layer_norm_eps", 1e-6 if dinov2 else 1e-12),
        act="silu" if gated else _ACTS[act],
        mlp="swiglu_packed" if gated else "mlp",
        **block,
        **common,
    )


def _class_names(settings: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """Of ``id2label``; a name that is there twice, as "crane" is in ImageNet, gets its number."""
    names = settings.get("id2label")
    if not isinstance(names, Mapping) or not num_classes:
        return None
    ordered = [str(names[str(i)]) for i in range(len(names)) if str(i) in names]
    numbered = all(re.fullmatch(r"LABEL_\d+", name) for name in ordered)
    if len(ordered) != num_classes or numbered:
        return None
    repeated = {name for name, count in Counter(ordered).items() if count > 1}
    unique = [f"{name} ({i})" if name in repeated else name for i, name in enumerate(ordered)]
    return unique if len(set(unique)) == num_classes else None


def _read_preprocess(path: Path, config: ModelConfig) -> Preprocess:
    file = path / "preprocessor_config.json"
    values = {key: value for key, value in _read_json(file, required=False).items() if value is not None}
    try:
        return _preprocess(values, config)
    except _WRONG as error:
        reason = str(error).rstrip(".")
        raise ModelFileError(f"{file} does not say how images are prepared: {reason}.") from error


def _preprocess(values: Mapping[str, Any], config: ModelConfig) -> Preprocess:
    """As transformers' image processor does it; without one, the usual of the model's size."""
    size = _pair(values.get("size"))
    crop = _pair(values.get("crop_size")) if values.get("do_center_crop", "crop_size" in values) else None
    target = crop or size
    if target is None:
        return Preprocess.for_size(config.image_hw)
    if target[0] % config.patch_size or target[1] % config.patch_size:
        target = size = config.image_hw
    resize = size or target
    channels, normalise = config.in_chans, values.get("do_normalize", True)
    # Pixels are divided by 255 here; what transformers does instead goes into mean and standard deviation.
    scale = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
    return Preprocess(
        img_size=target,
        mean=_scaled(values.get("image_mean", 0.5) if normalise else 0.0, scale, channels),
        std=_scaled(values.get("image_std", 0.5) if normalise else 1.0, scale, channels),
        crop_pct=min(1.0, target[0] / resize[0]),
        crop_mode="center" if _keeps_aspect(values) else "squash",
        interpolation=_RESAMPLE.get(values.get("resample", 2), "bicubic"),
    )


def _scaled(values: float | Sequence[float], scale: float, channels: int) -> tuple[float, ...]:
    sequence = [values] * channels if isinstance(values, (int, float)) else values
    return tuple(value / scale for value in sequence)


def _keeps_aspect(values: Mapping[str, Any]) -> bool:
    """A bare number is the shorter edge for some image processors, both edges for others."""
    size = values.get("size")
    if isinstance(size, Mapping):
        return "shortest_edge" in size
    name = values.get("image_processor_type", values.get("feature_extractor_type", ""))
    return isinstance(size, int) and name.startswith(("Bit", "CLIP"))


def _side(size: Any) -> int:
    pair = _pair(size)
    if pair is None or pair[0] != pair[1]:
        raise ConfigError(f"patch_size is {size}, and only square patches can be read")
    return pair[0]


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width of what transformers writes as a number, a pair or a dict."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (edge, edge) if edge else (size.get("height"), size.get("width"))
        return size if all(size) else None
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _licence(path: Path) -> str | None:
    try:
        with (path / "README.md").open(encoding="utf-8") as file:
            text = file.read(4000)
    except (OSError, ValueError):
        return None
    match = re.search(r"^license:\s*(\S+)\s*$", text, re.MULTILINE)
    return match[1] if match else None
