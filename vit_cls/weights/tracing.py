"""Tensors of a source, and what timm's conversion did to each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_cls.model.config import ModelConfig
from vit_cls.weights.convert_tokens import num_class_tokens_of


@dataclass(frozen=True)
class Weights:
    """Tensors of a source, ready to be converted.

    Args:
        raw: Under the file's own names.
        state: Under timm's names, for the grid of the target, with the tokens of ``config``.
        config: The architecture that the tensors have, tokens and classes as found in the file.
        remarks: What a user should know of the file.
    """

    raw: Mapping[str, Tensor | None]
    state: dict[str, Tensor]
    config: Any
    remarks: tuple[str, ...] = ()


def trace(weights: Weights, source: Any, target: ModelConfig) -> dict[str, tuple[str, str]]:
    """What timm's conversion did to each key: which were resized, and which of the file's it left out.

    A tensor that was only renamed, reshaped or cut shares its memory with the file's; one that was joined
    from several holds them as blocks.

    Args:
        weights: As they were read.
        source: The architecture of the weights.
        target: The architecture that they are for.

    Returns:
        Fate and note, by key of the model or, where it was dropped, of the file.
    """
    fates: dict[str, tuple[str, str]] = {}
    raw = {name: tensor for name, tensor in weights.raw.items() if tensor is not None}
    spans = {tensor.data_ptr(): name for name, tensor in raw.items()}
    used: set[str] = set()
    made: dict[str, Tensor] = {}
    for key, tensor in weights.state.items():
        name = spans.get(tensor.data_ptr())
        if name is not None:
            used.add(name)
        else:
            made[key] = tensor
    for key, tensor in list(made.items()):
        name = key if key in raw else _original(key, tensor, {n: raw[n] for n in raw if n not in used})
        if name is None:
            continue
        used.add(name)
        made.pop(key)
        if key == "pos_embed" and not torch.equal(raw[name].reshape(-1), tensor.reshape(-1)):
            fates[key] = ("resized", _grids(raw[name], source, target))
        elif key == "cls_token" and not torch.equal(raw[name], tensor):
            fates[key] = ("moved", "its position was added to it")
        elif raw[name].shape != tensor.shape:
            fates[key] = ("resized", f"{_sides(raw[name])} -> {_sides(tensor)}")
    made.pop("head.bias", None)  # zeros, where a projection has none; no part of the file
    for name in raw.keys() - used:
        if not any(_holds(whole, raw[name]) for whole in made.values()):
            fates[name] = ("dropped", "not a part of this model")
    fates |= dict.fromkeys(weights.raw.keys() - raw.keys(), ("dropped", "not read"))
    return fates


def _original(key: str, tensor: Tensor, unused: Mapping[str, Tensor]) -> str | None:
    """The tensor of the file that was both renamed and resized to this one."""
    if key == "pos_embed":
        found = [
            n for n, t in unused.items() if "pos" in n and t.ndim > 1 and t.shape[-1] == tensor.shape[-1]
        ]
    elif key == "patch_embed.proj.weight":
        found = [n for n, t in unused.items() if t.ndim == 4 and t.shape[:2] == tensor.shape[:2]]
    else:
        return None
    return max(found, key=lambda name: "vis" in name, default=None)  # a text tower has positions too


def _holds(whole: Tensor, part: Tensor) -> bool:
    """Whether ``part`` is a block of ``whole`` along the first axis, or all of it in another shape."""
    same_rows = part.ndim > 0 and part.shape[1:] == whole.shape[1:] and part.shape[0] > 0
    if part.dtype != whole.dtype or whole.numel() % max(1, part.numel()):
        return False
    if not (same_rows or part.numel() == whole.numel() > 0):
        return False
    wanted = part.reshape(-1)
    blocks = whole.reshape(-1).split(part.numel())
    return any(bool(torch.equal(b[:8], wanted[:8]) and torch.equal(b, wanted)) for b in blocks)


def _grids(positions: Tensor, source: Any, target: ModelConfig) -> str:
    prefix = 0 if source.no_embed_class else num_class_tokens_of(source) + source.reg_tokens
    count = positions.shape[-2] - prefix
    known, new = ([side // c.patch_size for side in c.image_hw] for c in (source, target))
    old = known if math.prod(known) == count else [math.isqrt(count)] * 2
    if old == new:
        return "positions of prefix tokens were added to the tokens"
    return f"{old[0]}x{old[1]} -> {new[0]}x{new[1]} patches"


def _sides(tensor: Tensor) -> str:
    return (
        f"{tensor.shape[2]}x{tensor.shape[3]} pixels"
        if tensor.ndim == 4
        else "x".join(map(str, tensor.shape))
    )
