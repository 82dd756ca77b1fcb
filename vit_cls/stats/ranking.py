"""How well a ranking of a gallery puts images of the query's class first: average precision and its kin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RECALL_AT = (1, 5, 10)
AT_ONCE = 1 << 23
"""Similarities that are held at a time, float64: 64 MB."""
SMALLEST_EIGENVALUE = 1e-8
"""Directions whose variance is below this share of the largest are left out of a whitening."""


@dataclass(frozen=True)
class Rankings:
    """What became of each query; arrays have one row a query that has a positive in the gallery.

    Args:
        queries: Positions of these queries.
        average_precision: ``1/P`` times the sum, over the ranks ``k`` of the ``P`` positives, of the
            precision among the first ``k``. No trapezoid.
        r_precision: Share of positives among the first ``P``.
        recall: Whether there is a positive among the first ``RECALL_AT``, shape ``(queries, 3)``.
        chance: Average precision that a random order is expected to have.
        without_positive: How many queries have no positive in the gallery; they are in no number.
    """

    queries: np.ndarray
    average_precision: np.ndarray
    r_precision: np.ndarray
    recall: np.ndarray
    chance: np.ndarray
    without_positive: int


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows of shape ``(rows, dim)`` scaled to length 1, float64; rows of zeros stay."""
    x = np.asarray(features, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


def rank(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray | None = None,
    gallery_labels: np.ndarray | None = None,
) -> Rankings:
    """Order a gallery by cosine similarity for each query; of equal similarities the earlier image first.

    Args:
        queries: Features, shape ``(queries, dim)``.
        gallery: Features, shape ``(images, dim)``. None: the queries, each without itself.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
        >>> rankings = rank(x, np.array([0, 1, 0, 1]))
        >>> rankings.average_precision.round(4).tolist()  # the positive is second, third, second, second
        [0.5, 0.3333, 0.5, 0.5]

    Source:
        Average precision and R-precision: Manning, Raghavan and Schuetze 2008, section 8.4.
    """
    x, labels = normalised(queries), np.asarray(query_labels)
    own = gallery is None
    y = x if gallery is None else normalised(gallery)
    known = labels if gallery_labels is None else np.asarray(gallery_labels)
    step = max(1, AT_ONCE // len(y))
    kept, precision, r_precision, recall, chance = [], [], [], [], []
    for start in range(0, len(x), step):
        rows = np.arange(start, min(start + step, len(x)))
        similarities = x[rows] @ y.T
        if own:
            similarities[np.arange(len(rows)), rows] = -np.inf  # itself comes last, and is cut off
        order = np.argsort(-similarities, axis=1, kind="stable")[:, : len(y) - int(own)]
        hits = known[order] == labels[rows, None]
        has_positive = hits.any(axis=1)
        kept.append(rows[has_positive])
        hits = hits[has_positive]
        precision.append(average_precision(hits))
        r_precision.append(_r_precision(hits))
        recall.append(np.stack([hits[:, :k].any(axis=1) for k in RECALL_AT], axis=1))
        chance.append(chance_precision(hits.sum(axis=1), hits.shape[1]))
    queries_kept = np.concatenate(kept)
    return Rankings(
        queries_kept,
        np.concatenate(precision),
        np.concatenate(r_precision),
        np.concatenate(recall),
        np.concatenate(chance),
        len(x) - len(queries_kept),
    )


def average_precision(hits: np.ndarray) -> np.ndarray:
    """Mean, over the positives, of the precision at the rank of each, from shape ``(queries, ranks)``."""
    ranks = np.arange(1, hits.shape[1] + 1)
    precision = np.cumsum(hits, axis=1) / ranks
    return (precision * hits).sum(axis=1) / hits.sum(axis=1)


def _r_precision(hits: np.ndarray) -> np.ndarray:
    positives = hits.sum(axis=1)
    return np.cumsum(hits, axis=1)[np.arange(len(hits)), positives - 1] / positives


def chance_precision(positives: np.ndarray, images: int) -> np.ndarray:
    """Average precision that is expected of a random order.

    Example:
        >>> chance_precision(np.array([1, 2]), 2).tolist()  # (1 + 1/2) / 2, and all are positives
        [0.75, 1.0]
    """
    # Rank k holds a positive with probability P/N; given that, each rank before it does with (P-1)/(N-1).
    harmonic = float((1 / np.arange(1, images + 1)).sum()) / images
    before = (np.asarray(positives) - 1) / max(1, images - 1)
    return harmonic + before * (1 - harmonic)


@dataclass(frozen=True)
class Whitening:
    """A change of features, shape ``(rows, dim)``, that was fitted on training images.

    Args:
        matrix: Multiplied by, shape ``(dim, kept)``; None where features are centred only.
    """

    mean: np.ndarray
    matrix: np.ndarray | None = None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Changed features, from shape ``(rows, dim)``."""
        x = np.asarray(features, dtype=np.float64) - self.mean
        return x if self.matrix is None else x @ self.matrix


def fit_whitening(train: np.ndarray) -> Whitening:
    """Centre, rotate to principal axes and divide by the standard deviations along them.

    Source:
        Jegou and Chum 2012, https://doi.org/10.1007/978-3-642-33709-3_55.
    """
    x = np.asarray(train, dtype=np.float64)
    mean = x.mean(axis=0)
    values, axes = np.linalg.eigh(np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))
    kept = values > SMALLEST_EIGENVALUE * values[-1]
    return Whitening(mean, axes[:, kept] / np.sqrt(values[kept]))
