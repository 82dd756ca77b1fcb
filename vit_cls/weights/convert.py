"""A checkpoint of one architecture to the weights of another: each change keeps the function where one can.

Every function here takes a state dict under timm's names and says what became of each key it touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from vit_cls.model.pooling import pool_parts
from vit_cls.weights.load_report import KeyFate

HEADS = ("head", "head_dist")
POOL_PREFIX = "attn_pool."


class TokenStructure(Protocol):
    """The part of an architecture that decides which tokens and positions its weights hold."""

    @property
    def class_token(self) -> bool:
        """Whether token 0 is the class token."""

    @property
    def reg_tokens(self) -> int:
        """Register tokens after it."""

    @property
    def no_embed_class(self) -> bool:
        """Whether prefix tokens go without a position."""

    @property
    def pool(self) -> str:
        """What the head reads."""


@dataclass
class Conversion:
    """Weights on their way from one architecture to another.

    Args:
        state: Tensors under timm's names; functions here change it.
        fates: What became of a key, where it was not simply loaded: fate and note.
        notes: Remarks for the user.
    """

    state: dict[str, Tensor]
    fates: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, key: str, note: str) -> None:
        """Take a tensor out, and say why.

        Args:
            key: Its name.
            note: Why it is not needed.
        """
        if self.state.pop(key, None) is not None:
            self.fates[key] = ("dropped", note)


def convert_tokens(work: Conversion, source: TokenStructure, target: TokenStructure) -> None:
    """Add or remove class token and registers, and mend the positions.

    A position that has no token any more goes; a new token starts with a position of zero. Where only the
    bookkeeping of positions differs (``no_embed_class``), they are added to the tokens: the same function.

    Args:
        work: Is changed.
        source: Of the weights.
        target: Of the model.
    """
    if "dist_token" in work.state:  # the distilled architecture keeps its tokens
        return
    state = work.state
    prefix = _split_positions(work, source)
    if not source.no_embed_class and target.no_embed_class and prefix is not None:
        _fold_positions(work, prefix, source)
        prefix = None
    if source.class_token and not target.class_token:
        work.drop("cls_token", "class token removed")
    if source.reg_tokens > target.reg_tokens and "reg_token" in state:
        if target.reg_tokens == 0:
            work.drop("reg_token", "register tokens removed")
        else:
            state["reg_token"] = state["reg_token"][:, : target.reg_tokens]
            work.fates["reg_token"] = ("resized", f"{source.reg_tokens} -> {target.reg_tokens} tokens")
    elif 0 < source.reg_tokens < target.reg_tokens and "reg_token" in state:
        old = state["reg_token"]
        more = torch.randn(1, target.reg_tokens - source.reg_tokens, old.shape[2]) * 1e-6
        state["reg_token"] = torch.cat([old, more.to(old)], dim=1)
        work.fates["reg_token"] = (
            "resized",
            f"{source.reg_tokens} -> {target.reg_tokens} tokens, new ones fresh",
        )
    if "pos_embed" in state and not target.no_embed_class:
        _join_positions(work, prefix, source, target)


def _split_positions(work: Conversion, source: TokenStructure) -> Tensor | None:
    """Leave positions of patches alone in the state; return those of the prefix, shape (1, prefix, dim)."""
    count = 0 if source.no_embed_class else int(source.class_token) + source.reg_tokens
    positions = work.state.get("pos_embed")
    if positions is None or count == 0:
        return None
    work.state["pos_embed"] = positions[:, count:]
    return positions[:, :count]


def _fold_positions(work: Conversion, prefix: Tensor, source: TokenStructure) -> None:
    first = int(source.class_token)
    for key, part in (("cls_token", prefix[:, :first]), ("reg_token", prefix[:, first:])):
        if key in work.state and part.any():
            work.state[key] = work.state[key] + part
            work.fates[key] = ("moved", "its position was added to it")
    work.fates.setdefault("pos_embed", ("resized", "positions of prefix tokens were added to the tokens"))


def _join_positions(
    work: Conversion, prefix: Tensor | None, source: TokenStructure, target: TokenStructure
) -> None:
    patches = work.state["pos_embed"]
    zeros = patches.new_zeros(1, 1, patches.shape[2])
    had_class = source.class_token and prefix is not None
    rows = []
    if target.class_token:
        rows.append(prefix[:, :1] if had_class and prefix is not None else zeros)
    first = int(source.class_token)
    registers = patches.new_zeros(1, 0, patches.shape[2]) if prefix is None else prefix[:, first:]
    rows.append(registers[:, : target.reg_tokens])
    rows.append(zeros.expand(1, target.reg_tokens - rows[-1].shape[1], -1))
    joined = torch.cat([*rows, patches], dim=1)
    before = patches.shape[1] + (0 if prefix is None else prefix.shape[1])
    same_tokens = (source.class_token, source.reg_tokens) == (target.class_token, target.reg_tokens)
    if joined.shape[1] != before or not same_tokens:
        old = work.fates.get("pos_embed", ("", ""))[1]
        note = f"{before} -> {joined.shape[1]} tokens, patches keep theirs"
        work.fates["pos_embed"] = ("resized", f"{old}; {note}" if old else note)
    work.state["pos_embed"] = joined


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
