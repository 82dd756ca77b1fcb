"""Class tokens, registers and positions of one architecture to those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import POOLINGS

APART = 0.02
"""Spread of the noise on a copy of a class token, that of fresh ones; equal tokens would never part."""


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

    A further class token is the first one with a little noise, at the first one's position. With a token for
    each class they are the rows of the head, and `convert_head` chooses among them.

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
        work.drop("cls_token", f"class token{'s' if num_class_tokens_of(source) > 1 else ''} removed")
    if source.reg_tokens > target.reg_tokens and "reg_token" in state:
        if target.reg_tokens == 0:
            work.drop("reg_token", "register tokens removed")
        else:
            state["reg_token"] = state["reg_token"][:, : target.reg_tokens]
            work.fates["reg_token"] = ("resized", f"{source.reg_tokens} -> {target.reg_tokens} tokens")
    elif 0 < source.reg_tokens < target.reg_tokens and "reg_token" in state:
        old = state["reg_token"]
        more = _noise(target.reg_tokens - source.reg_tokens, old, 1e-6)
        state["reg_token"] = torch.cat([old, more], dim=1)
        work.fates["reg_token"] = (
            "resized",
            f"{source.reg_tokens} -> {target.reg_tokens} tokens, new ones fresh",
        )
    if "pos_embed" in state and not target.no_embed_class:
        _join_positions(work, prefix, source, target)
    have, want = num_class_tokens_of(source), num_class_tokens_of(target)
    if "cls_token" in state and want and have != want and not both_per_class(source, target):
        take_class_tokens(work, first_ones(have, want), target)


def num_class_tokens_of(structure: TokenStructure) -> int:
    """How many class tokens an architecture has.

    Args:
        structure: Of the weights, or of the model.

    Example:
        >>> num_class_tokens_of(ViTConfig(pool="multicls:4")), num_class_tokens_of(ViTConfig(pool="gap"))
        (4, 1)
    """
    if isinstance(structure, ViTConfig):
        return structure.layout.num_prefix_tokens - structure.reg_tokens
    return int(structure.class_token)  # adapted architectures have one at most


def first_ones(have: int, want: int) -> list[int]:
    """Which class token each new one comes from; further ones come from the first.

    Args:
        have: Class tokens of the weights.
        want: Class tokens of the model.

    Example:
        >>> first_ones(2, 4), first_ones(4, 2)
        ([0, 1, 0, 0], [0, 1])
    """
    return [i if i < have else 0 for i in range(want)]


def take_class_tokens(work: Conversion, rows: Sequence[int], target: TokenStructure) -> None:
    """Class tokens and their positions by row; a row that was taken before gets noise on its token.

    Args:
        work: Is changed.
        rows: The class token that each new one comes from.
        target: Of the model.
    """
    old = work.state["cls_token"]
    have, index = old.shape[1], torch.tensor(rows)
    again = torch.tensor([row in rows[:i] for i, row in enumerate(rows)])
    work.state["cls_token"] = old[:, index] + _noise(len(rows), old, APART) * again[:, None]
    if again.any():
        kept = f"new ones are the first with noise of {APART:g} (equal ones would stay equal)"
    else:
        kept = "the first kept" if list(rows) == list(range(len(rows))) else "matched by class name"
    _resized(work, "cls_token", f"{have} -> {len(rows)} class tokens, {kept}")
    positions = work.state.get("pos_embed")
    if positions is not None and not target.no_embed_class:
        moved = torch.cat([positions[:, index], positions[:, have:]], dim=1)
        work.state["pos_embed"] = moved
        note = f"{positions.shape[1]} -> {moved.shape[1]} tokens, patches keep theirs"
        _resized(work, "pos_embed", note + (", new class tokens the first one's" if again.any() else ""))


def _resized(work: Conversion, key: str, note: str) -> None:
    """Note a change beside those before it."""
    before = work.fates.get(key, ("", ""))[1]
    work.fates[key] = ("resized", f"{before}; {note}" if before else note)


def both_per_class(source: TokenStructure, target: TokenStructure) -> bool:
    """Whether both have a class token for each class.

    Args:
        source: Of the weights.
        target: Of the model.
    """
    return all(pool in POOLINGS and POOLINGS[pool].per_class for pool in (source.pool, target.pool))


def _noise(count: int, like: Tensor, spread: float) -> Tensor:
    """Noise for that many tokens, from torch's global generator, which stays where it is."""
    with torch.random.fork_rng(devices=[]):
        return (torch.randn(1, count, like.shape[2]) * spread).to(like)


def _split_positions(work: Conversion, source: TokenStructure) -> Tensor | None:
    """Leave positions of patches alone in the state; return those of the prefix, shape (1, prefix, dim)."""
    count = 0 if source.no_embed_class else num_class_tokens_of(source) + source.reg_tokens
    positions = work.state.get("pos_embed")
    if positions is None or count == 0:
        return None
    work.state["pos_embed"] = positions[:, count:]
    return positions[:, :count]


def _fold_positions(work: Conversion, prefix: Tensor, source: TokenStructure) -> None:
    first = num_class_tokens_of(source)
    for key, part in (("cls_token", prefix[:, :first]), ("reg_token", prefix[:, first:])):
        if key in work.state and part.any():
            work.state[key] = work.state[key] + part
            work.fates[key] = ("moved", "its position was added to it")
    work.fates.setdefault("pos_embed", ("resized", "positions of prefix tokens were added to the tokens"))


def _join_positions(
    work: Conversion, prefix: Tensor | None, source: TokenStructure, target: TokenStructure
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
        _resized(work, "pos_embed", f"{before} -> {joined.shape[1]} tokens, patches keep theirs")
    work.state["pos_embed"] = joined
