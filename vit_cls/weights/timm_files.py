"""A file of weights under timm's names, or in a format that timm converts, to tensors for an architecture."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor

from vit_cls.errors import ModelFileError
from vit_cls.model.config import ModelConfig, ViTConfig
from vit_cls.weights.adapter import AdapterConfig
from vit_cls.weights.archives import check_archive
from vit_cls.weights.tensor_files import Weights, check_weights_file, read_tensors
from vit_cls.weights.timm_models import filter_of, ratio_of, skeleton, timm_arguments

_NPZ_PREFIX = re.compile(r"^(opt/target/)?(params/)?(img/)?")
"""What Google's training code puts in front of a name: an optimiser's state, parameters, an image tower."""


def read_timm_file(path: Path, config: Any, target: ModelConfig, *, name: str) -> Weights:
    """Read a file that is in timm's format, or in one that timm converts: the name decides how.

    The weights are those of ``config``, as far as the file agrees, on the grid of ``target``; ModelFileError
    where the file does not hold that architecture.
    """
    if path.suffix == ".npz":
        return _read_npz(path, config, target)
    raw, remarks = read_tensors(path)
    config = _structure_in(raw, config)
    state = fitted(raw, config, target, name, path)
    head = state.get("head.weight")
    if head is not None and head.ndim == 2:
        config = dataclasses.replace(config, num_classes=head.shape[0])
    return Weights(raw, state, config, remarks)


def _structure_in(raw: Mapping[str, Tensor], config: Any) -> Any:
    """The architecture with class token, registers and positions as a file under timm's names has them."""
    positions, weight = raw.get("pos_embed"), raw.get("patch_embed.proj.weight")
    if isinstance(config, AdapterConfig) or positions is None or weight is None or positions.ndim != 3:
        return config
    if "mask_token" in raw:  # DINOv2's own layout, which timm converts
        return config
    registers, classes = raw.get("reg_token"), raw.get("cls_token")
    structure: dict[str, Any] = {
        "class_token": classes is not None,
        "reg_tokens": 0 if registers is None else registers.shape[1],
    }
    count = 0 if classes is None else classes.numel() // positions.shape[2]
    prefix = count + structure["reg_tokens"]
    length = positions.shape[1]
    counts = {True: length, False: length - prefix}  # of patches, without and with positions for the prefix
    fits = {embed: count == math.prod(config.grid_size) for embed, count in counts.items()}
    squares = {embed: math.isqrt(count) ** 2 == count for embed, count in counts.items()}
    told = fits if any(fits.values()) else squares
    if prefix and told[True] != told[False]:
        structure["no_embed_class"] = told[True]
    head = raw.get("head.weight")
    if "attn_pool.latent" in raw:
        structure["pool"] = "map"
    elif count > 1:
        joined = head is not None and head.ndim == 2 and head.shape[1] == count * positions.shape[2]
        kind = "-diverse" if "attn_pool.weight" in raw else "-concat" if joined else ""
        structure["pool"] = f"multicls{kind}:{count}"
    elif head is not None and head.ndim == 2 and head.shape[1] == 2 * positions.shape[2]:
        structure["pool"] = "cls+gap"
    elif config.pool in ("cls", "cls+gap") and ("fc_norm.weight" in raw or not structure["class_token"]):
        structure["pool"] = "gap"
    return dataclasses.replace(config, **structure)


def fitted(
    raw: Mapping[str, Tensor], config: Any, target: ModelConfig, name: str, path: Path
) -> dict[str, Tensor]:
    """Tensors under timm's names with the target's grid, by timm's conversion, or ModelFileError."""
    try:
        return filter_of(name)(dict(raw), _skeleton_between(config, target))
    except (RuntimeError, KeyError, AssertionError, ValueError, IndexError, AttributeError) as error:
        raise ModelFileError(
            f"{path} does not hold the weights of {name or 'this architecture'}: timm's conversion stops at "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from error


def _skeleton_between(config: Any, target: ModelConfig) -> Any:
    """timm's model with the tokens of the weights and the grid of the target, without memory."""
    size = {"img_size": target.image_hw, "patch_size": target.patch_size}
    if isinstance(config, AdapterConfig):
        model = skeleton(config.timm_architecture, **{**config.arguments, **size}, in_chans=config.in_chans)
    else:
        pool = "cls" if config.class_token else "gap"
        others = config.layout.num_prefix_tokens - config.class_token  # timm's has one class token
        plain = dataclasses.replace(config, **size, pool=pool, reg_tokens=others, depth=1, floor_grid=True)
        with torch.device("meta"):
            model = TimmViT(**{**timm_arguments(plain), "fc_norm": False})
    model.pretrained_model_args = {"img_size": config.image_hw}  # or timm takes any grid for a square
    return model


def count_classes(path: Path) -> int | None:
    """Rows of the head in a file; None where it has none under a name that needs no conversion."""
    if path.suffix == ".npz":
        try:
            check_archive(path)
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                names = (name for name in file.files if _NPZ_PREFIX.sub("", name) == "head/bias")
                return next((len(file[name]) for name in names), None)
        except Exception:  # a damaged archive can raise anything; reading the weights says what is wrong
            return None
    if path.suffix == ".safetensors":  # the header tells; the tensors are read once, later
        try:
            with safe_open(path, framework="pt") as opened:
                shape = opened.get_slice("head.weight").get_shape()
        except (SafetensorError, OSError):
            return None
    else:
        head = read_tensors(path)[0].get("head.weight")
        shape = [] if head is None else list(head.shape)
    return shape[0] if len(shape) == 2 else None


def _read_npz(path: Path, config: Any, target: ModelConfig) -> Weights:
    """Read a file of Google's through timm's reader, which copies into a model: one with all the keys."""
    if not isinstance(config, ViTConfig):
        raise ModelFileError(
            f"{path}: Google's .npz files hold plain Vision Transformers, not this architecture."
        )
    check_weights_file(path)
    check_archive(path)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = {name: file[name].shape for name in file.files}
            strange = [name for name in file.files if file[name].dtype.kind not in "fiub"]
    except Exception as error:  # a damaged archive can raise anything
        reason = "" if "pickle" in str(error) else f": {error}"  # numpy advises to open it by running it
        raise ModelFileError(
            f"{path} is damaged or no .npz file of arrays alone{reason}. Copy or download it again."
        ) from error
    short = {_NPZ_PREFIX.sub("", name): shape for name, shape in names.items()}
    if "embedding/kernel" not in short:
        raise ModelFileError(
            f"{path} holds no Vision Transformer of Google's: it has no embedding/kernel "
            f"(it has {', '.join(list(names)[:3])})."
        )
    try:
        if strange:
            raise ValueError(f"{strange[0]} holds no numbers that numpy knows")
        config = dataclasses.replace(config, **_npz_architecture(short))
        config = dataclasses.replace(config, img_size=target.image_hw, patch_size=target.patch_size)
        with torch.device("meta"):
            model = TimmViT(**timm_arguments(config))
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.load_pretrained(str(path))
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError, StopIteration) as error:
        raise ModelFileError(f"{path} does not hold this architecture: {error}.") from error
    state = {key: value for key, value in model.state_dict().items() if not value.isnan().any()}
    read = ("embedding", "cls", "pos_embedding", "Transformer", "head", "MAPHead_0")
    unread = {name: None for name, known in zip(names, short, strict=True) if known.split("/")[0] not in read}
    return Weights({**state, **unread}, state, config)


def _npz_architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the shapes in a file of Google's tell: tokens, classes and sizes, as fields of `ViTConfig`."""
    blocks = {name.split("/")[1] for name in shapes if name.startswith("Transformer/encoderblock")}

    def in_block(ending: str) -> tuple[int, ...]:
        first = f"Transformer/{min(blocks)}/"
        return next(s for name, s in shapes.items() if name.startswith(first) and name.endswith(ending))

    query = in_block("query/kernel")  # (layers,) dim, heads, dim of a head; layers where blocks are stacked
    positions = shapes.get("pos_embedding", shapes.get("Transformer/posembed_input/pos_embedding", (1, 0, 0)))
    class_token = "cls" in shapes
    return {
        "pool": "map" if "MAPHead_0/probe" in shapes else "cls" if class_token else "gap",
        "fc_norm": False,
        "class_token": class_token,
        "reg_tokens": 0,
        "no_embed_class": class_token and math.isqrt(positions[-2]) ** 2 == positions[-2],
        "num_classes": shapes["head/bias"][-1] if "head/bias" in shapes else 0,
        "in_chans": shapes["embedding/kernel"][2],
        "embed_dim": shapes["embedding/kernel"][3],
        "depth": query[0] if len(query) == 4 else len(blocks),
        "num_heads": query[-2],
        "mlp_ratio": ratio_of(in_block("Dense_0/kernel")[-1], shapes["embedding/kernel"][3]),
    }
