"""Mosaics of labelled images, shrunk to tiles: inputs of which it is known what stands where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vit_cls.data.dataset import ArraySource, ImageSource
from vit_cls.data.index import ImageIndex
from vit_cls.data.transforms import model_reader
from vit_cls.errors import DataError
from vit_cls.model.classifier import Preprocess


@dataclass(frozen=True)
class Mosaics:
    """Mosaics and the labels of their tiles.

    Args:
        source: The mosaics, in the model's size.
        tiles: Label of each tile, int64, shape ``(mosaics, k, k)``.
        unused: Images that are in no mosaic, for their number is not a multiple of the tiles.
    """

    source: ArraySource
    tiles: np.ndarray
    unused: int


def make_mosaics(
    source: ImageSource,
    positions: np.ndarray,
    preprocess: Preprocess,
    *,
    k: int,
    rounds: int,
    seed: int,
    most: int,
    part: str = "given",
) -> Mosaics:
    """Shrink ``k * k`` images, drawn at random, into one of the model's size, again and again.

    Args:
        source: Labelled images.
        positions: Which of them can be read, int, shape ``(n,)``.
        preprocess: The model's; tiles are what it would have seen, shrunk.
        k: Tiles a side.
        rounds: How often each image is used; 1 keeps the mosaics independent of each other.
        seed: Of the draws.
        most: Mosaics at most.
        part: What the images are a part of, for the error message.

    Raises:
        DataError: If there are fewer than two mosaics.
    """
    rng = np.random.default_rng(seed)
    each = len(positions) // (k * k)
    if each * rounds < 2:
        raise DataError(
            f"{source.index.root}: the {len(positions)} images of the {part} part are too few for two "
            f"mosaics of {k}x{k} tiles. Give more images."
        )
    drawn = np.concatenate([rng.permutation(positions)[: each * k * k] for _ in range(rounds)])
    drawn = drawn.reshape(-1, k * k)[:most]
    reader = model_reader(preprocess)
    images = [mosaic([reader(source.read(position)) for position in row], k) for row in drawn.tolist()]
    labels = source.index.labels[drawn].reshape(-1, k, k)
    names = [f"{i:06d}" for i in range(len(drawn))]
    # Their class is that of the first tile; an index needs one.
    index = ImageIndex(Path("mosaics"), names, labels[:, 0, 0].astype(np.int64), source.index.class_names)
    return Mosaics(ArraySource(index, torch.stack(images)), labels, len(positions) - each * k * k)


def mosaic(tiles: list[Tensor], k: int) -> Tensor:
    """One image of ``k * k`` others.

    Args:
        tiles: uint8, each of shape ``(3, height, width)``, row by row.
        k: Tiles a side.

    Returns:
        uint8, of the same shape; tiles differ by a pixel where ``k`` does not divide a side.

    Example:
        >>> tiles = [torch.full((3, 4, 4), i, dtype=torch.uint8) for i in range(4)]
        >>> mosaic(tiles, 2)[0].tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    """
    height, width = tiles[0].shape[1:]
    out = torch.empty_like(tiles[0])
    rows, cols = edges(height, k), edges(width, k)
    for i, tile in enumerate(tiles):
        r, c = divmod(i, k)
        top, bottom, left, right = rows[r], rows[r + 1], cols[c], cols[c + 1]
        out[:, top:bottom, left:right] = F.resize(tile, [bottom - top, right - left], antialias=True)
    return out


def edges(pixels: int, k: int) -> list[int]:
    """Where tiles begin and end.

    Args:
        pixels: Of the side.
        k: Tiles along it.

    Example:
        >>> edges(7, 2)
        [0, 4, 7]
    """
    return [-(-pixels * i // k) for i in range(k + 1)]


def tile_of_patches(
    image_hw: tuple[int, int], grid_size: tuple[int, int], patch_size: int, k: int
) -> np.ndarray:
    """Which tile each patch lies in.

    Args:
        image_hw: Height and width of the mosaic, in pixels.
        grid_size: Patch rows and columns.
        patch_size: Side of a patch, in pixels.
        k: Tiles a side.

    Returns:
        Position of the tile, row by row, int64, shape ``(patches,)``; -1 where a patch lies in more than one.

    Example:
        >>> tile_of_patches((6, 6), (3, 3), 2, 2).tolist()
        [0, -1, 1, -1, -1, -1, 2, -1, 3]
    """

    def along(pixels: int, patches: int) -> np.ndarray:
        ends = np.array(edges(pixels, k)[1:])
        first = np.searchsorted(ends, np.arange(patches) * patch_size, side="right")
        last = np.searchsorted(ends, (np.arange(patches) + 1) * patch_size - 1, side="right")
        return np.where(first == last, first, -1)

    rows, cols = along(image_hw[0], grid_size[0]), along(image_hw[1], grid_size[1])
    inside = (rows[:, None] >= 0) & (cols[None] >= 0)
    return np.where(inside, rows[:, None] * k + cols[None], -1).reshape(-1)
