"""Metrics of a classifier's probabilities: each is a function here and a row of `METRICS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from vit_cls.stats.intervals import (
    RESAMPLES,
    RESAMPLES_AT_ONCE,
    bootstrap_means,
    percentile_interval,
    wilson_interval,
)

TOP_K = 5
ECE_BINS = 15
COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Scored:
    """Probabilities of some images with their classes, and what several metrics need of them.

    Args:
        probs: float64, shape ``(images, classes)``; rows add up to 1.
        targets: True class of each image, int, at least one.
        seed: Of the resampling.
    """

    probs: np.ndarray
    targets: np.ndarray
    seed: int = 0

    @property
    def top_k(self) -> int:
        """`TOP_K`, or all classes where there are fewer."""
        return min(TOP_K, self.probs.shape[1])

    @cached_property
    def preds(self) -> np.ndarray:
        """The first of the most probable classes, shape ``(images,)``."""
        return self.probs.argmax(axis=1)

    @cached_property
    def right(self) -> np.ndarray:
        """Whether each prediction is the true class."""
        return np.asarray(self.preds == self.targets)

    @cached_property
    def confidence(self) -> np.ndarray:
        """Probability of each prediction."""
        return np.asarray(self.probs.max(axis=1))

    @cached_property
    def true_probs(self) -> np.ndarray:
        """Probability of each true class."""
        return self.probs[np.arange(len(self.targets)), self.targets]

    @cached_property
    def losses(self) -> np.ndarray:
        """Negative log likelihood of each image, in nats."""
        return negative_log(self.true_probs)

    @cached_property
    def brier(self) -> np.ndarray:
        """Squared distance of the probabilities of each image from the truth, summed over classes."""
        return np.asarray((self.probs**2).sum(axis=1) - 2 * self.true_probs + 1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """Images by true class (rows) and predicted class (columns)."""
        preds, targets = torch.from_numpy(self.preds), torch.from_numpy(self.targets)
        counts = multiclass_confusion_matrix(preds, targets, self.probs.shape[1], validate_args=False)
        return counts.numpy()

    @cached_property
    def bins(self) -> np.ndarray:
        """Membership of each image in the bins of equal width, then of equal mass, shape ``(images, 30)``."""
        width, mass = equal_width_bins(self.confidence), equal_mass_bins(self.confidence)
        return np.hstack([np.eye(ECE_BINS)[width], np.eye(ECE_BINS)[mass]])

    @cached_property
    def gaps(self) -> np.ndarray:
        """Accuracy less confidence of each image in its bins, likewise."""
        return self.bins * (self.right - self.confidence)[:, None]

    @cached_property
    def resampled(self) -> np.ndarray:
        """Bootstrapped means of `losses`, `brier` and `gaps`, shape ``(1000, 2 + 30)``."""
        return bootstrap_means(np.column_stack([self.losses, self.brier, self.gaps]), seed=self.seed)

    @cached_property
    def calibrated_gaps(self) -> np.ndarray:
        """Means of `gaps` were each image right with the probability that it says, shape ``(1000, 30)``."""
        rng = np.random.default_rng([self.seed, 1])
        means = []
        for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
            draws = min(RESAMPLES_AT_ONCE, RESAMPLES - start)
            right = rng.random((draws, len(self.confidence))) < self.confidence
            means.append((right - self.confidence) @ self.bins / len(self.confidence))
        return np.concatenate(means)

    @cached_property
    def curve(self) -> np.ndarray:
        """Accuracy of the k most confident images, k = 1 ... n."""
        return accuracy_curve(self.confidence, self.right)


@dataclass(frozen=True)
class Estimate:
    """The value of a metric, and its 95 % confidence interval if there is a method for it here."""

    value: float
    ci95: tuple[float, float] | None = None


def _top1(scored: Scored) -> Estimate:
    correct, images = int(scored.right.sum()), len(scored.targets)
    return Estimate(correct / images, wilson_interval(correct, images))


def _topk(scored: Scored) -> Estimate:
    probs, targets = torch.from_numpy(scored.probs), torch.from_numpy(scored.targets)
    share = multiclass_accuracy(probs, targets, probs.shape[1], top_k=scored.top_k, average="micro")
    return Estimate(round(float(share) * len(targets)) / len(targets))  # torchmetrics' is float32


def _balanced_accuracy(scored: Scored) -> Estimate:
    recalls = [int(row[i]) / int(row.sum()) for i, row in enumerate(scored.confusion) if row.sum()]
    return Estimate(float(np.mean(recalls)))


def _nll(scored: Scored) -> Estimate:
    return Estimate(float(scored.losses.mean()), percentile_interval(scored.resampled[:, 0]))


def _brier(scored: Scored) -> Estimate:
    return Estimate(float(scored.brier.mean()), percentile_interval(scored.resampled[:, 1]))


def _ece(scored: Scored, part: slice) -> Estimate:
    """Expected calibration error over some of the bins.

    Absolute values make an ECE too large by chance, and a resampled one twice over, so percentiles alone miss
    a small truth nearly always, and the basic bootstrap interval, which takes that off twice, a middling one.
    The interval here is as wide as either, and reaches 0 where the ECE is no larger than a perfectly
    calibrated model's would be (consistency resampling, https://doi.org/10.1175/WAF993.1).
    """
    ece = float(np.abs(scored.gaps.mean(axis=0)[part]).sum())
    low, high = percentile_interval(np.abs(scored.resampled[:, 2:][:, part]).sum(axis=1))
    null = np.abs(scored.calibrated_gaps[:, part]).sum(axis=1)
    lower = 0.0 if ece <= np.quantile(null, 0.975) else max(0.0, 2 * ece - high)
    return Estimate(ece, (min(lower, ece), min(1.0, max(ece, high, 2 * ece - low))))


def _aurc(scored: Scored) -> Estimate:
    return Estimate(float(1 - scored.curve.mean()))


@dataclass(frozen=True)
class Metric:
    """One metric, as results compute, print and explain it.

    Args:
        title: For people; ``{k}`` is how many classes the top-k accuracy reads.
        meaning: What it is, and which values are good.
        percent: Whether pages write it as a percentage.
    """

    title: str
    meaning: str
    estimate: Callable[[Scored], Estimate]
    percent: bool = False


METRICS: dict[str, Metric] = {
    "top1": Metric("top-1", "correct over scored", _top1, percent=True),
    "top5": Metric("top-{k}", "the true class is among the first {k} predictions", _topk, percent=True),
    "balanced_accuracy": Metric(
        "balanced accuracy", "mean recall of the classes in the folder", _balanced_accuracy, percent=True
    ),
    "nll": Metric("NLL", "mean negative log likelihood of the true class, in nats; lower is better", _nll),
    "brier": Metric(
        "Brier",
        "mean squared distance of probabilities and truth, summed over classes: 0 is best, 2 is worst",
        _brier,
    ),
    "ece": Metric(
        "ECE",
        f"expected calibration error, the mean gap of confidence and accuracy, {ECE_BINS} bins of equal "
        "width; best: 0",
        partial(_ece, part=slice(0, ECE_BINS)),
    ),
    "ece_equal_mass": Metric(
        "ECE, equal mass",
        f"likewise, in {ECE_BINS} bins of as many images each",
        partial(_ece, part=slice(ECE_BINS, None)),
    ),
    "aurc": Metric(
        "AURC",
        "area under the risk-coverage curve: the mean error rate as ever more images are answered, the most "
        "confident first; lower is better",
        _aurc,
    ),
}
"""By their keys in JSON, in its order.

Top-k accuracy and confusion: torchmetrics. ECE: https://arxiv.org/abs/1706.04599; in equal masses:
https://arxiv.org/abs/1909.10155. Brier 1950. Risk and coverage: https://arxiv.org/abs/1705.08500. Calibration
is computed here in float64: torchmetrics rounds to float32, where a confident model's 1 - 1e-9 becomes 1, and
gives certain images a bin of their own."""


def measure(scored: Scored) -> dict[str, Estimate]:
    """Every metric of `METRICS`, by its key."""
    return {key: metric.estimate(scored) for key, metric in METRICS.items()}


@dataclass(frozen=True)
class Bin:
    """Images of like confidence.

    Args:
        upper: Where the next bin begins.
        confidence: Their mean confidence; NaN where there are none.
    """

    lower: float
    upper: float
    images: int
    confidence: float
    correct: int


@dataclass(frozen=True)
class CoveragePoint:
    """What is right if only the most confident share is answered; of ties at its border, the mean."""

    coverage: float
    images: int
    accuracy: float
    min_confidence: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed, for charts and tables.

    Args:
        coverage: Accuracy at each of `COVERAGES`.
        curve: Accuracy of the k most confident images, k = 1 ... n.
    """

    bins: list[Bin]
    coverage: list[CoveragePoint]
    curve: np.ndarray
    seed: int


def calibration_of(scored: Scored) -> Calibration:
    """Reliability by bin, and accuracy by coverage."""
    which = equal_width_bins(scored.confidence)
    images, total = np.bincount(which, minlength=ECE_BINS), np.bincount(which, scored.confidence, ECE_BINS)
    correct = np.bincount(which, scored.right, ECE_BINS)
    bins = [
        Bin(
            i / ECE_BINS,
            (i + 1) / ECE_BINS,
            int(images[i]),
            float(total[i] / images[i]) if images[i] else math.nan,
            int(correct[i]),
        )
        for i in range(ECE_BINS)
    ]
    curve, ordered = scored.curve, np.sort(scored.confidence)[::-1]
    kept = [(share, max(1, math.ceil(round(share * len(curve), 9)))) for share in COVERAGES]
    points = [CoveragePoint(share, k, float(curve[k - 1]), float(ordered[k - 1])) for share, k in kept]
    return Calibration(bins, points, curve, scored.seed)


def negative_log(probs: np.ndarray) -> np.ndarray:
    """The loss of each probability, in nats; finite for 0 too."""
    return -np.log(np.maximum(probs, np.finfo(np.float64).tiny))


def equal_width_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence in [0, 1], among 15 that divide it evenly; 1 is in the last."""
    return np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def equal_mass_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, among 15 that divide the images evenly; ties are in one bin."""
    return np.searchsorted(np.sort(confidence), confidence, side="left") * ECE_BINS // len(confidence)


def accuracy_curve(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Accuracy of the k most confident images, for every k; images that tie count by their mean.

    Example:
        >>> accuracy_curve(np.array([0.5, 0.9, 0.5]), np.array([True, True, False])).round(3).tolist()
        [1.0, 0.75, 0.667]
    """
    values, which = np.unique(-confidence, return_inverse=True)
    share = np.bincount(which, weights=right, minlength=len(values)) / np.bincount(which)
    ordered = share[np.sort(which)]
    return ordered.cumsum() / np.arange(1, len(ordered) + 1)
