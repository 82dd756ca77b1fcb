"""Google's .npz files of Vision Transformers, in all the layouts that timm's reader knows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT

from vit_cls.errors import ModelFileError
from vit_cls.model.config import ModelConfig, ViTConfig
from vit_cls.weights.tensor_files import check_weights_file
from vit_cls.weights.timm_models import ratio_of, timm_arguments
from vit_cls.weights.tracing import Weights


def read_npz(path: Path, config: Any, target: ModelConfig) -> Weights:
    """Read a file of Google's through timm's reader, which copies into a model: one with room for every key.

    Args:
        path: The file.
        config: The architecture that it should have.
        target: The architecture that the weights are for: their grid is resized to its.

    Raises:
        ModelFileError: If the file is damaged, or holds no Vision Transformer of Google's.
    """
    if not isinstance(config, ViTConfig):
        raise ModelFileError(
            f"{path}: Google's .npz files hold plain Vision Transformers, not this architecture."
        )
    check_weights_file(path)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = {name: file[name].shape for name in file.files}
    except Exception as error:  # a damaged archive can raise anything
        reason = "" if "pickle" in str(error) else f": {error}"  # numpy advises to open it by running it
        raise ModelFileError(
            f"{path} is damaged or no .npz file of arrays alone{reason}. Copy or download it again."
        ) from error
    short = {
        name.removeprefix("opt/target/").removeprefix("params/").removeprefix("img/"): s
        for name, s in names.items()
    }
    if "embedding/kernel" not in short:
        raise ModelFileError(
            f"{path} holds no Vision Transformer of Google's: it has no embedding/kernel "
            f"(it has {', '.join(list(names)[:3])})."
        )
    try:
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
