"""Mosaics of labelled images, shrunk to tiles: inputs of which it is known what stands where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vit_cls.data.dataset import ArraySource, FolderSource, ImageSource
from vit_cls.data.index import ImageIndex
from vit_cls.data.transforms import model_reader
from vit_cls.errors import ConfigError, DataError
from vit_cls.model.classifier import Preprocess
from vit_cls.stats.least_squares import PENALTIES, Linear, fits_of_moments, moments_of, one_against_all


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
        positions: Which of them can be read, int, shape ``(n,)``.
        rounds: How often each image is used; 1 keeps the mosaics independent of each other.
        most: Mosaics at most.

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
    """One image of ``k * k`` others, uint8 ``(3, height, width)``, row by row.

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
    """Where tiles begin and end: ``[0, 4, 7]`` for two in 7 pixels."""
    return [-(-pixels * i // k) for i in range(k + 1)]


def tile_of_patches(
    image_hw: tuple[int, int], grid_size: tuple[int, int], patch_size: int, k: int
) -> np.ndarray:
    """Which tile each patch lies in, row by row, int64 ``(patches,)``; -1 where it lies in more than one.

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


_CHUNK = 64


@dataclass(frozen=True)
class Part:
    """Features of the patches of some images, and what is to be told from them.

    Args:
        count: Images.
        features: Of some images, shape ``(rows, patches, dim)``; or ``(rows, 1, dim)`` where all patches of
            an image have the same.
        targets: Of the same images, shape ``(rows, patches, targets)``; NaN where a patch does not count.
    """

    count: int
    features: Callable[[slice], np.ndarray]
    targets: Callable[[slice], np.ndarray]

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features and targets, some images at a time."""
        for start in range(0, self.count, _CHUNK):
            rows = slice(start, min(start + _CHUNK, self.count))
            yield self.features(rows), self.targets(rows)


Losses = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""Predictions and targets, shape ``(rows, patches, targets)``, to the error of each image by task."""


def fit_by_patch(train: Part, val: Part, test: Part, losses: Losses) -> dict[str, np.ndarray]:
    """Ridge regression by patches, chosen on validation: the error of each test image, by task."""
    fits = list(fits_of_moments(moments_of(_as_rows(train)), PENALTIES))
    sums = [{task: float(e.sum()) for task, e in _errors([fit], val, losses)[0].items()} for fit in fits]
    best = {task: min(range(len(fits)), key=lambda i: (sums[i][task], -fits[i].penalty)) for task in sums[0]}
    used = sorted(set(best.values()))
    found = dict(zip(used, _errors([fits[i] for i in used], test, losses), strict=True))
    return {task: found[i][task] for task, i in best.items()}


def _as_rows(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for x, y in part.chunks():
        wide = np.broadcast_to(x, (*y.shape[:2], x.shape[2]))
        kept = ~np.isnan(y).any(axis=2)
        yield wide[kept], y[kept]


def _errors(fits: Sequence[Linear], part: Part, losses: Losses) -> list[dict[str, np.ndarray]]:
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in fits]
    for x, y in part.chunks():
        flat = x.reshape(-1, x.shape[2])
        for fit, chunks in zip(fits, found, strict=True):
            # Where patches share their features they share the prediction, to the bit.
            predicted = fit(flat).reshape(*x.shape[:2], -1)
            chunks.append(losses(np.broadcast_to(predicted, y.shape), y))
    return [{task: np.concatenate([c[task] for c in chunks]) for task in chunks[0]} for chunks in found]


def place_targets(grid_size: tuple[int, int]) -> np.ndarray:
    """Which patch it is, one against all, then its row and column from 0 to 1: ``(patches, patches + 2)``."""
    rows, cols = grid_size
    row, col = np.divmod(np.arange(rows * cols), cols)
    one_of = one_against_all(np.arange(rows * cols), rows * cols)
    return np.concatenate([one_of, np.stack([row / max(1, rows - 1), col / max(1, cols - 1)], 1)], axis=1)


def place_losses(predicted: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Share of patches that are not found, and squared errors of place and colour, of each image.

    Args:
        predicted: Shape ``(images, patches, patches + 5)``: see `place_targets`, then three colours.
    """
    patches = predicted.shape[1]
    missed = predicted[:, :, :patches].argmax(axis=2) != np.arange(patches)
    squares = np.square(predicted[:, :, patches:] - targets[:, :, patches:]).sum(axis=1)
    return {
        "position": missed.mean(axis=1),
        "place": squares[:, :2].sum(axis=1),
        "colour": squares[:, 2:].sum(axis=1),
        **{f"missed {i}": missed[:, i].astype(np.float64) for i in range(patches)},
    }


def tile_losses(predicted: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Share of patches, of those that lie in one tile, whose tile gets another class."""
    wrong = predicted.argmax(axis=2) != targets.argmax(axis=2)
    kept = ~np.isnan(targets).any(axis=2)
    return {"tile": (wrong & kept).sum(axis=1) / kept.sum(axis=1)}


def subset(source: ImageSource, most: int, rng: np.random.Generator) -> ImageSource:
    """The same images, or ``most`` of them, drawn at random, in their order.

    Raises:
        ConfigError: If there are more images than that, and they are neither files nor in memory.
    """
    if len(source.index) <= most:
        return source
    chosen = np.sort(rng.permutation(len(source.index))[:most])
    index = source.index.subset(chosen)
    if isinstance(source, FolderSource):
        return FolderSource(index)
    if isinstance(source, ArraySource):
        return ArraySource(index, source.images[chosen])
    raise ConfigError(f"--max_images {most}: {type(source).__name__} cannot be reduced. Raise it.")
