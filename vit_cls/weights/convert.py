"""A checkpoint of one architecture to the weights of another: each change keeps the function where one can.

Every function here takes a state dict under timm's names and says what became of each key it touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from vit_cls.model.pooling import POOLINGS, pool_parts
from vit_cls.weights.convert_tokens import (
    Conversion,
    TokenStructure,
    both_per_class,
    convert_tokens,
    first_ones,
    num_class_tokens_of,
    take_class_tokens,
)
from vit_cls.weights.load_report import KeyFate

__all__ = [
    "Conversion",
    "TokenStructure",
    "convert_channels",
    "convert_head",
    "convert_layer_scale",
    "convert_norm",
    "convert_tokens",
    "fill_layer_scale",
    "finish",
    "match_class_names",
]

HEADS = ("head", "head_dist")
POOL_PREFIX = "attn_pool."


def convert_norm(work: Conversion, keys: Mapping[str, object]) -> None:
    """Put the pretrained final norm where the model has its own, before or after the pooling.

    Args:
        work: Is changed.
        keys: Names of the model's weights.
    """
    for here, there in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{here}.weight" not in work.state or f"{here}.weight" in keys or f"{there}.weight" not in keys:
            continue
        if f"{there}.weight" in work.state:
            continue
        for part in ("weight", "bias"):
            if f"{here}.{part}" in work.state:
                work.state[f"{there}.{part}"] = work.state.pop(f"{here}.{part}")
                work.fates[f"{there}.{part}"] = ("moved", f"from {here}.{part}")
        place = "after" if there == "fc_norm" else "before"
        work.notes.append(f"the pretrained final norm is kept, now {place} the pooling ({here} -> {there})")
        return


def convert_channels(work: Conversion, in_chans: int) -> None:
    """Adapt the patch embedding to another number of channels.

    One channel sums the weights (a grey image as three equal channels gives the same tokens); more are
    repeated in turn, and scaled so that the sum stays.

    Args:
        work: Is changed.
        in_chans: Channels of the model.
    """
    key = "patch_embed.proj.weight"
    weight = work.state.get(key)
    if weight is not None and weight.ndim == 4 and weight.shape[1] != in_chans:
        work.state[key] = adapt_input_conv(in_chans, weight, base_chans=weight.shape[1])
        note = f"{weight.shape[1]} -> {in_chans} channels"
        old = work.fates.get(key, ("", ""))[1]
        work.fates[key] = ("resized", f"{old}; {note}" if old else note)


def convert_layer_scale(work: Conversion, keys: Mapping[str, object]) -> None:
    """LayerScale that the model lacks goes into the weights before it: the same function.

    Args:
        work: Is changed.
        keys: Names of the model's weights.
    """
    for key in [key for key in work.state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", key)]:
        if key in keys:
            continue
        block, name = key.removesuffix(".gamma").rsplit(".", 1)
        layer = f"{block}.attn.proj" if name == "ls1" else f"{block}.mlp.fc2"
        gamma = work.state.pop(key)
        for part in ("weight", "bias"):
            if f"{layer}.{part}" in work.state:
                tensor = work.state[f"{layer}.{part}"]
                work.state[f"{layer}.{part}"] = tensor * (gamma[:, None] if tensor.ndim == 2 else gamma)
                work.fates[f"{layer}.{part}"] = ("moved", "LayerScale was multiplied into it")
        work.fates[key] = ("dropped", f"multiplied into {layer.rsplit('.', 1)[1]}")


def fill_layer_scale(work: Conversion, shapes: Mapping[str, torch.Size]) -> None:
    """LayerScale that the checkpoint lacks starts at 1, not at its usual small value: the same function.

    Args:
        work: Is changed.
        shapes: Shapes of the model's weights.
    """
    for key, shape in shapes.items():
        if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", key) and key not in work.state:
            work.state[key] = torch.ones(shape)
            work.fates[key] = ("fresh", "ones, which keep the function")


def match_class_names(
    wanted: Sequence[str], known: Sequence[str], aliases: Callable[[str], Sequence[str]] = lambda name: ()
) -> list[int] | None:
    """Where each wanted class stands among the known ones.

    Args:
        wanted: Classes of the new head.
        known: Classes of the checkpoint's head.
        aliases: Other names of a known class. They are compared without regard to case; one that fits two
            known classes fits none.

    Returns:
        A position for each wanted class, all different; None where one has none.

    Example:
        >>> match_class_names(["dog", "cat"], ["cat", "cow", "dog"])
        [2, 0]
    """
    places: dict[str, set[int]] = {}
    for i, name in enumerate(known):
        for alias in aliases(name):
            places.setdefault(alias.lower(), set()).add(i)
    exact = {name: i for i, name in enumerate(known)}
    found: list[int] = []
    for name in wanted:
        near = places.get(name.lower(), set())
        place = exact.get(name, next(iter(near)) if len(near) == 1 else None)
        if place is None:
            return None
        found.append(place)
    return found if len(set(found)) == len(found) else None


def convert_head(
    work: Conversion, source: TokenStructure, target: TokenStructure, rows: Sequence[int] | None, reason: str
) -> None:
    """Keep the rows of the wanted classes, and the columns of what the pooling still reads.

    Another pooling's own weights go: the names and shapes of two may be the same, the meaning is not. Where
    each class has a token, those tokens are the rows.

    Args:
        work: Is changed.
        source: Of the weights.
        target: Of the model.
        rows: Positions in the checkpoint's head, one a class; None for a new head.
        reason: Why the head is new, or which rows were kept; for the report.
    """
    if target.pool != "distilled" and "head_dist.weight" in work.state:
        for part in ("weight", "bias"):
            work.drop(f"head_dist.{part}", f"pool {target.pool} has one head")
    if pool_parts(source.pool) != pool_parts(target.pool):
        for key in [key for key in work.state if key.startswith(POOL_PREFIX)]:
            work.drop(key, f"pool {source.pool} -> {target.pool}")
    if both_per_class(source, target):
        have, want = num_class_tokens_of(source), num_class_tokens_of(target)
        chosen = first_ones(have, want) if rows is None else list(rows)
        if "cls_token" in work.state and chosen != list(range(have)):
            take_class_tokens(work, chosen, target)
        rows = None if rows is None else [0]  # of the head, which all classes share
    elif any(pool in POOLINGS and POOLINGS[pool].per_class for pool in (source.pool, target.pool)):
        rows, reason = None, f"pool {source.pool} -> {target.pool}"
    for head in HEADS:
        weight = work.state.get(f"{head}.weight")
        if weight is None:
            continue
        columns = None if rows is None else _columns(source.pool, target.pool, weight)
        if rows is None or columns is None:
            for part in ("weight", "bias"):
                work.drop(
                    f"{head}.{part}", reason if rows is None else f"pool {source.pool} -> {target.pool}"
                )
            continue
        whole = list(rows) == list(range(weight.shape[0]))
        if not whole or columns is not weight:
            index = torch.tensor(rows)
            work.state[f"{head}.weight"] = columns[index]
            bias = work.state.get(f"{head}.bias")
            if bias is not None:
                work.state[f"{head}.bias"] = bias[index]
            notes = [] if whole else [reason]
            notes += (
                []
                if columns is weight
                else [f"pool {source.pool} -> {target.pool}: {weight.shape[1]} -> {columns.shape[1]} columns"]
            )
            for part in ("weight", "bias") if not whole else ("weight",):
                if f"{head}.{part}" in work.state:
                    work.fates[f"{head}.{part}"] = ("resized", "; ".join(notes))
        if source.pool != target.pool and columns is weight:
            work.notes.append(f"the head was trained on pool {source.pool} and now reads {target.pool}")


def _columns(source_pool: str, target_pool: str, weight: Tensor) -> Tensor | None:
    """The head's columns for another pooling; None where none of them has a meaning there."""
    source, target = pool_parts(source_pool), pool_parts(target_pool)
    if len(source) == len(target) == 1 or source == target:
        return weight
    width = weight.shape[1] // len(source)
    if not set(source) & set(target):
        return None
    parts = {part: weight[:, i * width : (i + 1) * width] for i, part in enumerate(source)}
    return torch.cat([parts.get(part, weight.new_zeros(len(weight), width)) for part in target], dim=1)


def finish(work: Conversion, shapes: Mapping[str, torch.Size]) -> tuple[list[KeyFate], list[str]]:
    """The fate of every key, once nothing is left to convert; what the model lacks leaves the state.

    Args:
        work: Is changed: afterwards it holds keys of the model alone.
        shapes: Shapes of the model's weights.

    Returns:
        The rows of the report, and the keys whose shapes differ.
    """
    for key in [key for key in work.state if key not in shapes]:
        work.drop(key, "the model has no such weights")
    wrong = [key for key in shapes if key in work.state and work.state[key].shape != shapes[key]]
    rows = []
    for key in shapes:
        if key in work.state:
            fate, note = work.fates.get(key, ("loaded", ""))
        else:
            dropped = work.fates.get(key, ("", ""))[1]
            fate, note = "fresh", f"not the checkpoint's: {dropped}" if dropped else ""
        rows.append(KeyFate(key, fate, note))
    gone = [
        (key, note) for key, (fate, note) in work.fates.items() if fate == "dropped" and key not in shapes
    ]
    return rows + [KeyFate(key, "dropped", note) for key, note in gone], wrong
