"""Patch tokens to the encoder's input: class token, registers and positions, (B, P, D) -> (B, N, D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLASS_POSITIONS = ("first", "middle", "last")


@dataclass(frozen=True)
class TokenLayout:
    """Where each kind of token stands in the sequence: class tokens, registers, then patches.

    Args:
        grid_size: Patch rows and columns.
        num_class_tokens: How many class tokens, where there are any.

    Example:
        >>> layout = TokenLayout(class_token=True, reg_tokens=4, grid_size=(14, 14))
        >>> layout.num_prefix_tokens, layout.num_tokens
        (5, 201)
    """

    class_token: bool
    reg_tokens: int
    grid_size: tuple[int, int]
    num_class_tokens: int = 1

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens and registers: everything in front of the patches."""
        return int(self.class_token) * self.num_class_tokens + self.reg_tokens

    @property
    def num_patches(self) -> int:
        """Patches of the grid."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.num_prefix_tokens + self.num_patches


def causal_mask(layout: TokenLayout, class_position: str, device: torch.device | None = None) -> Tensor:
    """Who may attend to whom when each token sees itself and what comes before it, ``(tokens, tokens)``.

    The tensors keep their order, class tokens first: without a mask the encoder treats all places alike, so
    that only here it matters where class tokens stand: ``first``, in the ``middle`` of the patches, or
    ``last``; registers stand before all patches.

    Example:
        >>> causal_mask(TokenLayout(True, 0, (1, 2)), "last").int().tolist()
        [[1, 1, 1], [0, 1, 0], [0, 1, 1]]
    """
    classes = layout.num_prefix_tokens - layout.reg_tokens
    others = layout.num_tokens - classes
    before = {"first": 0, "middle": layout.reg_tokens + layout.num_patches // 2, "last": others}[
        class_position
    ]
    ranks = torch.arange(others, device=device)
    ranks = torch.cat([before + torch.arange(classes, device=device), ranks + classes * (ranks >= before)])
    return ranks[:, None] >= ranks


def add_prefix_and_positions(
    patches: Tensor, prefix: Sequence[Tensor], pos_embed: Tensor | None, *, no_embed_class: bool
) -> Tensor:
    """Prepend the prefix tokens to the patches, (B, P, D), and add the positions: (B, N, D).

    Args:
        prefix: Learned tokens in order, each of shape ``(1, tokens, dim)``; may be empty.
        pos_embed: Positions, shape ``(1, tokens, dim)``, or ``(1, patches, dim)`` with
            ``no_embed_class``; None adds none.
    """
    batch = patches.shape[0]
    if pos_embed is not None and no_embed_class:
        patches = patches + pos_embed
    tokens = torch.cat([*(p.expand(batch, -1, -1) for p in prefix), patches], dim=1) if prefix else patches
    if pos_embed is not None and not no_embed_class:
        tokens = tokens + pos_embed
    return tokens


def sincos_2d_positions(grid_size: tuple[int, int], dim: int, *, temperature: float = 10_000.0) -> Tensor:
    """Fixed two-dimensional sine-cosine positions, in raster order, ``(rows * cols, dim)``, in [-1, 1].

    The first half of ``dim`` encodes the column, the second the row; divisible by 4.

    Source:
        MAE, https://github.com/facebookresearch/mae/blob/main/util/pos_embed.py.
    """
    rows, cols = grid_size
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(cols, dtype=torch.float64), indexing="ij"
    )
    angles_col = col.flatten()[:, None] * omega
    angles_row = row.flatten()[:, None] * omega
    parts = [angles_col.sin(), angles_col.cos(), angles_row.sin(), angles_row.cos()]
    return torch.cat(parts, dim=1).float()
