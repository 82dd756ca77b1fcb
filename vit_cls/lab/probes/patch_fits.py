"""Ridge regression whose samples are patches: every place has the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls.stats.least_squares import PENALTIES, Linear, fits_of_moments, moments_of, one_against_all

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
    """Ridge regression whose samples are patches; each task's penalty is chosen on validation images.

    Args:
        train: To fit on.
        val: To choose on.
        test: To report on.
        losses: What counts.

    Returns:
        The error of each test image, by task.
    """
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
    """Which patch it is, one against all, and its row and column from 0 to 1.

    Args:
        grid_size: Patch rows and columns.

    Returns:
        Shape ``(patches, patches + 2)``.
    """
    rows, cols = grid_size
    row, col = np.divmod(np.arange(rows * cols), cols)
    one_of = one_against_all(np.arange(rows * cols), rows * cols)
    return np.concatenate([one_of, np.stack([row / max(1, rows - 1), col / max(1, cols - 1)], 1)], axis=1)


def place_losses(predicted: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Share of patches that are not found, and squared errors of place and colour, of each image.

    Args:
        predicted: Shape ``(images, patches, patches + 5)``: see `place_targets`, then three colours.
        targets: Likewise.
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
    """Share of patches, of those that lie in one tile, whose tile gets another class.

    Args:
        predicted: One against all, shape ``(mosaics, patches, classes)``.
        targets: Likewise; NaN where a patch lies in several tiles.
    """
    wrong = predicted.argmax(axis=2) != targets.argmax(axis=2)
    kept = ~np.isnan(targets).any(axis=2)
    return {"tile": (wrong & kept).sum(axis=1) / kept.sum(axis=1)}
