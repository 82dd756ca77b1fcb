"""A model folder of Hugging Face's transformers: architecture, weights under timm's names, classes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import Preprocess
from vit_cls.model.config import ModelConfig, ViTConfig
from vit_cls.weights.adapter import AdapterConfig
from vit_cls.weights.tensor_files import read_tensors

MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")
"""``model_type`` of the configurations that can be read."""

_ACTS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}

# (pattern of transformers, key of timm); query, key and value are joined afterwards
_RULES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.(?:register_tokens|distillation_token)", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (
        r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(\w+)",
        r"blocks.\1.mlp.fc1.\2",
    ),
    (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
]


@dataclass(frozen=True)
class HFModel:
    """What a folder of transformers holds.

    Args:
        config: The architecture of the weights.
        state: The weights, under timm's names.
        raw: The weights under the file's own names.
        preprocess: How images are prepared.
        class_names: One a class; None where the names are only numbered, or there is no head.
        licence: Stated nowhere in such a folder but in its README's header; None where it has none.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    raw: dict[str, Tensor]
    preprocess: Preprocess
    class_names: list[str] | None
    licence: str | None


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a model of transformers (of any kind).

    Args:
        path: The folder.
    """
    return "model_type" in _read_json(path / "config.json", required=False)


def read_hf_folder(path: Path) -> HFModel:
    """Read ``config.json``, ``model.safetensors`` and, where there is one, ``preprocessor_config.json``.

    Args:
        path: The folder.

    Raises:
        ModelFileError: If a file is missing or damaged, or the model is of another kind.
    """
    settings = _read_json(path / "config.json")
    kind = settings.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelFileError(
            f"{path} holds a model of transformers of type {kind!r}; those that can be read are "
            f"{', '.join(MODEL_TYPES)}."
        )
    raw, _ = read_tensors(path / "model.safetensors")
    state = _timm_state(raw, kind)
    try:
        config = _architecture(settings, state)
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelFileError(f"{path / 'config.json'} does not describe its weights: {error}.") from error
    names = settings.get("id2label") or {}
    ordered = [str(names[str(i)]) for i in range(len(names)) if str(i) in names]
    numbered = all(re.fullmatch(r"LABEL_\d+", name) for name in ordered)
    named = len(ordered) == config.num_classes == len(set(ordered)) and not numbered
    preprocess = _preprocess(_read_json(path / "preprocessor_config.json", required=False), config)
    return HFModel(config, state, raw, preprocess, ordered if named else None, _licence(path))


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelFileError(f"there is no {path}; a folder of transformers has one.") from None
        return {}
    except (OSError, ValueError) as error:
        if required:
            raise ModelFileError(f"{path} cannot be read as JSON: {error}.") from error
        return {}
    return values if isinstance(values, dict) else {}


def _timm_state(raw: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        name = name.removeprefix(f"{kind}.")
        for pattern, target in _RULES:
            if re.fullmatch(pattern, name):
                state[re.sub(pattern, target, name)] = tensor
                break
    for key in [key for key in state if ".attn.query." in key]:
        parts = [state.pop(key.replace("query", part), None) for part in ("query", "key", "value")]
        present = [part for part in parts if part is not None]
        if len(present) == 3:  # one missing is seen later, as a key of the model without weights
            state[key.replace("query", "qkv")] = torch.cat(present)
    if kind == "dinov2_with_registers" and "pos_embed" in state and "cls_token" in state:
        # timm's layout: positions of patches alone, that of the class token added to it
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def _architecture(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> ModelConfig:
    kind, dim = settings["model_type"], settings["hidden_size"]
    dinov2 = kind.startswith("dinov2")
    head = state.get("head.weight")
    gated = bool(settings.get("use_swiglu_ffn"))
    hidden = settings.get("intermediate_size") or int(dim * settings.get("mlp_ratio", 4))
    if "blocks.0.mlp.fc1.weight" in state:
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    common: dict[str, Any] = {
        "img_size": _pair(settings.get("image_size")) or (224, 224),
        "patch_size": settings.get("patch_size", 16),
        "in_chans": settings.get("num_channels", 3),
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": dim,
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "class_token": True,
        "reg_tokens": {"deit": 1, "dinov2_with_registers": settings.get("num_register_tokens", 4)}.get(
            kind, 0
        ),
        "no_embed_class": kind == "dinov2_with_registers",
    }
    if "head_dist.weight" in state:
        # Two heads are what timm's distilled architectures have; its epsilon (1e-6) differs from 1e-12 by
        # nothing that fp32 shows.
        arguments = {key: common[key] for key in ("embed_dim", "depth", "num_heads")}
        arguments["mlp_ratio"] = hidden / dim
        return AdapterConfig(
            "deit_base_distilled_patch16_224", pool="distilled", arguments=arguments, **common
        )
    return ViTConfig(
        pool="cls+gap" if dinov2 and head is not None else "cls",
        mlp_ratio=hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim,
        qkv_bias=settings.get("qkv_bias", True),
        init_values=settings.get("layerscale_value", 1.0) if dinov2 else None,
        norm_eps=settings.get("layer_norm_eps", 1e-6 if dinov2 else 1e-12),
        act="silu" if gated else _ACTS[settings.get("hidden_act", "gelu")],
        mlp="swiglu_packed" if gated else "mlp",
        **common,
    )


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
    normalise = values.get("do_normalize", True)
    return Preprocess(
        img_size=target,
        mean=tuple(values.get("image_mean", (0.5,) * 3)) if normalise else (0.0,) * 3,
        std=tuple(values.get("image_std", (0.5,) * 3)) if normalise else (1.0,) * 3,
        crop_pct=min(1.0, target[0] / resize[0]),
        crop_mode="center" if "shortest_edge" in (values.get("size") or {}) else "squash",
        interpolation=_RESAMPLE.get(values.get("resample", 2), "bicubic"),
    )


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
        text = (path / "README.md").read_text(encoding="utf-8")[:4000]
    except (OSError, ValueError):
        return None
    found = re.search(r"^license:\s*(\S+)\s*$", text, re.MULTILINE)
    return found[1] if found else None
