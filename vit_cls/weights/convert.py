"""A checkpoint of one architecture to the weights of another: each change keeps the function where one can.

Every function here takes a `Conversion`, changes its tensors, and says what became of each key it touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vit_cls.model.config import ModelConfig, ViTConfig
from vit_cls.model.pooling import POOLINGS, pool_parts
from vit_cls.weights.load_report import KeyFate

HEADS = ("head", "head_dist")
POOL_PREFIX = "attn_pool."
CLASS_TOKEN_NOISE = 0.02
"""Spread of the noise on a copy of a class token, that of fresh ones; equal tokens would never part."""
KEEPS_FUNCTION = "ones, which keep the function"
"""Note on a fresh weight that changes nothing, and so does not count as missing."""


@dataclass
class Conversion:
    """Weights on their way from one architecture to another; the functions here change them."""

    state: dict[str, Tensor]  # under timm's names
    fates: dict[str, tuple[str, str]] = field(default_factory=dict)  # fate and note, unless simply loaded
    notes: list[str] = field(default_factory=list)  # for the user

    def drop(self, key: str, note: str) -> None:
        """Take a tensor out, and say why; a key that is not there has no fate."""
        if self.state.pop(key, None) is not None:
            self.fates[key] = ("dropped", note)

    def resized(self, key: str, note: str) -> None:
        """Note another shape beside the changes before it."""
        before = self.fates.get(key, ("", ""))[1]
        self.fates[key] = ("resized", f"{before}; {note}" if before else note)


def convert_tokens(work: Conversion, source: ModelConfig, target: ModelConfig) -> None:
    """Add or remove class token and registers, and mend the positions.

    A position that has no token any more goes; a new token starts with a position of zero. Where only the
    bookkeeping of positions differs (``no_embed_class``), they are added to the tokens: the same function.
    A further class token is the first one with a little noise, at the first one's position. With a token for
    each class they are the rows of the head, and `convert_head` chooses among them.
    """
    if "dist_token" in work.state:  # the distilled architecture keeps its tokens
        return
    prefix = _split_positions(work, source)
    if not source.no_embed_class and target.no_embed_class and prefix is not None:
        _fold_positions(work, prefix, source)
        prefix = None
    have, want = num_class_tokens_of(source), num_class_tokens_of(target)
    if source.class_token and not target.class_token:
        work.drop("cls_token", f"class token{'s' if have > 1 else ''} removed")
    _convert_registers(work, source.reg_tokens, target.reg_tokens)
    if "pos_embed" in work.state and not target.no_embed_class:
        _join_positions(work, prefix, source, target)
    if "cls_token" in work.state and want and have != want and not _both_per_class(source, target):
        _take_class_tokens(work, [i if i < have else 0 for i in range(want)], target)


def num_class_tokens_of(config: ModelConfig) -> int:
    """How many class tokens an architecture has."""
    if isinstance(config, ViTConfig):
        return config.layout.num_prefix_tokens - config.reg_tokens
    return int(config.class_token)  # adapted architectures have one at most


def _convert_registers(work: Conversion, have: int, want: int) -> None:
    if "reg_token" not in work.state or have == want:
        return
    old = work.state["reg_token"]
    if want == 0:
        work.drop("reg_token", "register tokens removed")
    elif want < have:
        work.state["reg_token"] = old[:, :want]
        work.fates["reg_token"] = ("resized", f"{have} -> {want} tokens")
    elif have:
        work.state["reg_token"] = torch.cat([old, _noise(want - have, old, 1e-6)], dim=1)
        work.fates["reg_token"] = ("resized", f"{have} -> {want} tokens, new ones fresh")


def _take_class_tokens(work: Conversion, rows: Sequence[int], target: ModelConfig) -> None:
    """Class tokens and their positions by row; a row that was taken before gets noise on its token."""
    old = work.state["cls_token"]
    have, index = old.shape[1], torch.tensor(rows)
    again = torch.tensor([row in rows[:i] for i, row in enumerate(rows)])
    work.state["cls_token"] = old[:, index] + _noise(len(rows), old, CLASS_TOKEN_NOISE) * again[:, None]
    if again.any():
        kept = f"new ones are the first with noise of {CLASS_TOKEN_NOISE:g} (equal ones would stay equal)"
    else:
        kept = "the first kept" if list(rows) == list(range(len(rows))) else "matched by class name"
    work.resized("cls_token", f"{have} -> {len(rows)} class tokens, {kept}")
    positions = work.state.get("pos_embed")
    if positions is not None and not target.no_embed_class:
        moved = torch.cat([positions[:, index], positions[:, have:]], dim=1)
        work.state["pos_embed"] = moved
        note = f"{positions.shape[1]} -> {moved.shape[1]} tokens, patches keep theirs"
        work.resized("pos_embed", note + (", new class tokens the first one's" if again.any() else ""))


def _both_per_class(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether both have a class token for each class."""
    return _per_class(source.pool) and _per_class(target.pool)


def _per_class(pool: str) -> bool:
    return pool in POOLINGS and POOLINGS[pool].per_class


def _noise(count: int, like: Tensor, spread: float) -> Tensor:
    """Noise for that many tokens, from torch's global generator, which stays where it is."""
    with torch.random.fork_rng(devices=[]):
        return (torch.randn(1, count, like.shape[2]) * spread).to(like)


def _split_positions(work: Conversion, source: ModelConfig) -> Tensor | None:
    """Leave positions of patches alone in the state; return those of the prefix, shape (1, prefix, dim)."""
    count = 0 if source.no_embed_class else num_class_tokens_of(source) + source.reg_tokens
    positions = work.state.get("pos_embed")
    if positions is None or count == 0:
        return None
    work.state["pos_embed"] = positions[:, count:]
    return positions[:, :count]


def _fold_positions(work: Conversion, prefix: Tensor, source: ModelConfig) -> None:
    """Add the positions of prefix tokens to the tokens."""
    first = num_class_tokens_of(source)
    for key, part in (("cls_token", prefix[:, :first]), ("reg_token", prefix[:, first:])):
        if key in work.state and part.any():
            work.state[key] = work.state[key] + part
            work.fates[key] = ("moved", "its position was added to it")
    work.fates.setdefault("pos_embed", ("resized", "positions of prefix tokens were added to the tokens"))


def _join_positions(
    work: Conversion, prefix: Tensor | None, source: ModelConfig, target: ModelConfig
) -> None:
    """Positions of class tokens, as many as there were, of the target's registers, and of the patches."""
    patches = work.state["pos_embed"]
    zeros = patches.new_zeros(1, 1, patches.shape[2])
    first = num_class_tokens_of(source)
    rows = []
    if target.class_token and first:
        rows.append(zeros.expand(1, first, -1) if prefix is None else prefix[:, :first])
    elif target.class_token:
        rows.append(zeros.expand(1, num_class_tokens_of(target), -1))
    registers = patches.new_zeros(1, 0, patches.shape[2]) if prefix is None else prefix[:, first:]
    rows.append(registers[:, : target.reg_tokens])
    rows.append(zeros.expand(1, target.reg_tokens - rows[-1].shape[1], -1))
    joined = torch.cat([*rows, patches], dim=1)
    before = patches.shape[1] + (0 if prefix is None else prefix.shape[1])
    same_tokens = (source.class_token, source.reg_tokens) == (target.class_token, target.reg_tokens)
    if joined.shape[1] != before or not same_tokens:
        work.resized("pos_embed", f"{before} -> {joined.shape[1]} tokens, patches keep theirs")
    work.state["pos_embed"] = joined


def convert_norm(work: Conversion, shapes: Mapping[str, torch.Size]) -> None:
    """Put the pretrained final norm where the model has its own, before or after the pooling."""
    for here, there in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{here}.weight" not in work.state or f"{here}.weight" in shapes:
            continue
        if f"{there}.weight" not in shapes or f"{there}.weight" in work.state:
            continue
        for part in ("weight", "bias"):
            if f"{here}.{part}" in work.state:
                work.state[f"{there}.{part}"] = work.state.pop(f"{here}.{part}")
                work.fates[f"{there}.{part}"] = ("moved", f"from {here}.{part}")
        place = "after" if there == "fc_norm" else "before"
        work.notes.append(f"the pretrained final norm is kept, now {place} the pooling ({here} -> {there})")
        return


def convert_channels(work: Conversion, in_chans: int) -> None:
    """One channel sums the weights (a grey image gives the same tokens); more repeat them, the sum stays."""
    key = "patch_embed.proj.weight"
    weight = work.state.get(key)
    if weight is not None and weight.ndim == 4 and weight.shape[1] != in_chans:
        from timm.models import adapt_input_conv

        work.state[key] = adapt_input_conv(in_chans, weight, base_chans=weight.shape[1])
        work.resized(key, f"{weight.shape[1]} -> {in_chans} channels")


def convert_layer_scale(work: Conversion, shapes: Mapping[str, torch.Size]) -> None:
    """Keep the function where one has no LayerScale: it goes into the weights before it, or starts at 1."""
    for key in [key for key in work.state if _is_layer_scale(key) and key not in shapes]:
        block, name = key.removesuffix(".gamma").rsplit(".", 1)
        layer = f"{block}.attn.proj" if name == "ls1" else f"{block}.mlp.fc2"
        gamma = work.state.pop(key)
        for part in ("weight", "bias"):
            if f"{layer}.{part}" in work.state:
                tensor = work.state[f"{layer}.{part}"]
                work.state[f"{layer}.{part}"] = tensor * (gamma[:, None] if tensor.ndim == 2 else gamma)
                work.fates[f"{layer}.{part}"] = ("moved", "LayerScale was multiplied into it")
        work.fates[key] = ("dropped", f"multiplied into {layer.rsplit('.', 1)[1]}")
    if not any(key.endswith("norm1.weight") for key in work.state):
        return  # no blocks of a ViT, so nothing whose function could be kept
    for key, shape in shapes.items():
        if _is_layer_scale(key) and key not in work.state:
            work.state[key] = torch.ones(shape)
            work.fates[key] = ("fresh", KEEPS_FUNCTION)


def _is_layer_scale(key: str) -> bool:
    return re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", key) is not None


def match_class_names(
    wanted: Sequence[str], known: Sequence[str], aliases: Callable[[str], Sequence[str]] = lambda name: ()
) -> list[int] | None:
    """Where each wanted class stands among the known ones; None where one has no place of its own.

    Aliases of a known class are compared without regard to case; one that fits two known classes fits none.
    """
    places: dict[str, set[int]] = {}
    for i, name in enumerate(known):
        for alias in aliases(name):
            places.setdefault(alias.lower(), set()).add(i)
    exact = {name: i for i, name in enumerate(known)}
    rows: list[int] = []
    for name in wanted:
        near = places.get(name.lower(), set())
        place = exact.get(name, next(iter(near)) if len(near) == 1 else None)
        if place is None:
            return None
        rows.append(place)
    return rows if len(set(rows)) == len(rows) else None


def convert_head(
    work: Conversion, source: ModelConfig, target: ModelConfig, rows: Sequence[int] | None, reason: str
) -> None:
    """Keep the rows of the wanted classes, if any, and the columns of what the pooling still reads.

    Another pooling's own weights go: the names and shapes of two may be the same, the meaning is not. Where
    each class has a token, those tokens are the rows. The report gives the reason.
    """
    change = f"pool {source.pool} -> {target.pool}"
    if target.pool != "distilled" and "head_dist.weight" in work.state:
        for part in ("weight", "bias"):
            work.drop(f"head_dist.{part}", f"pool {target.pool} has one head")
    if pool_parts(source.pool) != pool_parts(target.pool):
        for key in [key for key in work.state if key.startswith(POOL_PREFIX)]:
            work.drop(key, change)
    if _both_per_class(source, target):
        have, want = num_class_tokens_of(source), num_class_tokens_of(target)
        chosen = [i if i < have else 0 for i in range(want)] if rows is None else list(rows)
        if "cls_token" in work.state and chosen != list(range(have)):
            _take_class_tokens(work, chosen, target)
        rows = None if rows is None else [0]  # of the head, which all classes share
    elif _per_class(source.pool) or _per_class(target.pool):
        rows, reason = None, change
    for head in HEADS:
        weight = work.state.get(f"{head}.weight")
        if weight is None:
            continue
        columns = None if rows is None else _columns(source.pool, target.pool, weight)
        if rows is None or columns is None:
            for part in ("weight", "bias"):
                work.drop(f"{head}.{part}", reason if rows is None else change)
            continue
        _take_rows(work, head, rows, columns, reason, change)
        if source.pool != target.pool and columns is weight:
            work.notes.append(f"the head was trained on pool {source.pool} and now reads {target.pool}")


def _take_rows(
    work: Conversion, head: str, rows: Sequence[int], columns: Tensor, reason: str, change: str
) -> None:
    """The rows of a head, of the columns that are still read."""
    weight = work.state[f"{head}.weight"]
    whole, same_columns = list(rows) == list(range(weight.shape[0])), columns is weight
    if whole and same_columns:
        return
    index = torch.tensor(rows)
    work.state[f"{head}.weight"] = columns[index]
    if f"{head}.bias" in work.state:
        work.state[f"{head}.bias"] = work.state[f"{head}.bias"][index]
    notes = [] if whole else [reason]
    if not same_columns:
        notes.append(f"{change}: {weight.shape[1]} -> {columns.shape[1]} columns")
    for part in ("weight",) if whole else ("weight", "bias"):
        if f"{head}.{part}" in work.state:
            work.fates[f"{head}.{part}"] = ("resized", "; ".join(notes))


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
    """The fate of every key, and those whose shapes differ; what the model lacks leaves the state."""
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
