"""Whether a probability means what it says, what refusing to answer buys, and one temperature to mend it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from vit_cls.errors import DataError
from vit_cls.evaluation.predictions import Predictions
from vit_cls.stats.intervals import RESAMPLES, RESAMPLES_AT_ONCE, bootstrap_means, percentile_interval

ECE_BINS = 15
COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)
TEMPERATURES = (0.01, 100.0)
"""A fit that ends at one of these bounds has found nothing."""


@dataclass(frozen=True)
class Bin:
    """Images of like confidence.

    Args:
        lower: Least confidence of the bin.
        upper: Where the next bin begins.
        images: How many there are.
        confidence: Their mean confidence; NaN where there are none.
        correct: How many of them are right.
    """

    lower: float
    upper: float
    images: int
    confidence: float
    correct: int


@dataclass(frozen=True)
class CoveragePoint:
    """What is right if only the most confident share is answered.

    Args:
        coverage: The share that was asked for, in (0, 1].
        images: How many that are, rounded up.
        accuracy: Share of them that is right; images that tie at the border count by their mean.
        min_confidence: The least confidence among them: answer from here on.
    """

    coverage: float
    images: int
    accuracy: float
    min_confidence: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed.

    Args:
        nll_ci95: Bootstrap 95 % interval of the negative log likelihood.
        brier: Squared distance of probabilities and truth, summed over classes, the mean over images: 0 to 2.
        brier_ci95: Its bootstrap 95 % interval.
        ece: Expected calibration error, 15 bins of equal width.
        ece_ci95: Its bootstrap 95 % interval.
        ece_equal_mass: Expected calibration error, 15 bins of (nearly) equal numbers of images.
        ece_equal_mass_ci95: Its bootstrap 95 % interval.
        bins: The bins of equal width.
        coverage: Accuracy at each of `COVERAGES`.
        curve: Accuracy of the k most confident images, k = 1 ... n.
        aurc: Area under the risk-coverage curve: the mean of one minus ``curve``.
        seed: Of the resampling.
    """

    nll_ci95: tuple[float, float]
    brier: float
    brier_ci95: tuple[float, float]
    ece: float
    ece_ci95: tuple[float, float]
    ece_equal_mass: float
    ece_equal_mass_ci95: tuple[float, float]
    bins: list[Bin]
    coverage: list[CoveragePoint]
    curve: np.ndarray
    aurc: float
    seed: int


def measure_calibration(probs: np.ndarray, targets: np.ndarray, *, seed: int = 0) -> Calibration:
    """Scores of probabilities, each with an interval.

    Args:
        probs: float64, shape ``(images, classes)``; rows add up to 1.
        targets: True class of each image, shape ``(images,)``.
        seed: Of the resampling.

    Source:
        ECE: https://arxiv.org/abs/1706.04599; in equal masses: https://arxiv.org/abs/1909.10155. Brier 1950.
        Risk and coverage: https://arxiv.org/abs/1705.08500. Computed here in float64: torchmetrics rounds to
        float32, where a confident model's 1 - 1e-9 becomes 1, and gives certain images a bin of their own.
    """
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets
    true_probs = probs[np.arange(len(targets)), targets]
    brier = (probs**2).sum(axis=1) - 2 * true_probs + 1
    width, mass = equal_width_bins(confidence), equal_mass_bins(confidence)
    onehot = np.hstack([np.eye(ECE_BINS)[width], np.eye(ECE_BINS)[mass]])
    gaps = onehot * (right - confidence)[:, None]
    means = bootstrap_means(np.column_stack([negative_log(true_probs), brier, gaps]), seed=seed)
    null = _perfectly_calibrated(confidence, onehot, seed)
    eces, intervals = [], []
    for part in (slice(0, ECE_BINS), slice(ECE_BINS, None)):
        eces.append(float(np.abs(gaps.mean(axis=0)[part]).sum()))
        resampled = np.abs(means[:, 2:][:, part]).sum(axis=1)
        intervals.append(_ece_interval(eces[-1], resampled, np.abs(null[:, part]).sum(axis=1)))
    curve = accuracy_curve(confidence, right)
    return Calibration(
        nll_ci95=percentile_interval(means[:, 0]),
        brier=float(brier.mean()),
        brier_ci95=percentile_interval(means[:, 1]),
        ece=eces[0],
        ece_ci95=intervals[0],
        ece_equal_mass=eces[1],
        ece_equal_mass_ci95=intervals[1],
        bins=_bins(confidence, right, width),
        coverage=_coverage(curve, np.sort(confidence)[::-1]),
        curve=curve,
        aurc=float(1 - curve.mean()),
        seed=seed,
    )


def negative_log(probs: np.ndarray) -> np.ndarray:
    """The loss of each probability, in nats; finite for 0 too.

    Args:
        probs: In [0, 1].
    """
    return -np.log(np.maximum(probs, np.finfo(np.float64).tiny))


def equal_width_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, among 15 that divide [0, 1] evenly; 1 is in the last.

    Args:
        confidence: In [0, 1].

    Example:
        >>> equal_width_bins(np.array([0.0, 0.07, 1.0])).tolist()
        [0, 1, 14]
    """
    return np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def equal_mass_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, among 15 that divide the images evenly; ties are in one bin.

    Args:
        confidence: In [0, 1].

    Example:
        >>> equal_mass_bins(np.array([0.9, 0.5, 0.5, 0.7, 0.8])).tolist()
        [12, 0, 0, 6, 9]
    """
    return np.searchsorted(np.sort(confidence), confidence, side="left") * ECE_BINS // len(confidence)


def accuracy_curve(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Accuracy of the k most confident images, for every k; the order of the images does not matter.

    Args:
        confidence: Of each image.
        right: Whether its prediction is right.

    Returns:
        float64, shape ``(images,)``; of images that tie, each counts as the mean of them.

    Example:
        >>> accuracy_curve(np.array([0.5, 0.9, 0.5]), np.array([True, True, False])).round(3).tolist()
        [1.0, 0.75, 0.667]
    """
    values, which = np.unique(-confidence, return_inverse=True)
    share = np.bincount(which, weights=right, minlength=len(values)) / np.bincount(which)
    ordered = share[np.sort(which)]
    return ordered.cumsum() / np.arange(1, len(ordered) + 1)


def _coverage(curve: np.ndarray, confidence: np.ndarray) -> list[CoveragePoint]:
    kept = [(share, max(1, math.ceil(round(share * len(curve), 9)))) for share in COVERAGES]
    return [CoveragePoint(share, k, float(curve[k - 1]), float(confidence[k - 1])) for share, k in kept]


def _bins(confidence: np.ndarray, right: np.ndarray, which: np.ndarray) -> list[Bin]:
    images, total = np.bincount(which, minlength=ECE_BINS), np.bincount(which, confidence, ECE_BINS)
    correct = np.bincount(which, right, ECE_BINS)
    return [
        Bin(
            i / ECE_BINS,
            (i + 1) / ECE_BINS,
            int(images[i]),
            float(total[i] / images[i]) if images[i] else math.nan,
            int(correct[i]),
        )
        for i in range(ECE_BINS)
    ]


def _perfectly_calibrated(confidence: np.ndarray, onehot: np.ndarray, seed: int) -> np.ndarray:
    """Gaps of the bins as they would be were each image right with the probability that it says."""
    rng = np.random.default_rng([seed, 1])
    means = []
    for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        draws = min(RESAMPLES_AT_ONCE, RESAMPLES - start)
        right = rng.random((draws, len(confidence))) < confidence
        means.append((right - confidence) @ onehot / len(confidence))
    return np.concatenate(means)


def _ece_interval(ece: float, resampled: np.ndarray, null: np.ndarray) -> tuple[float, float]:
    """From the lower bound of the basic bootstrap interval to its upper one or the percentiles', if higher.

    Absolute values make an ECE too large by chance, and a resampled one twice over, so percentiles alone
    miss a small truth nearly always, and the basic interval, which takes that off twice, a middling one.
    Together they are as wide as either where gaps are plain, and cautious where they are not. Where the ECE
    is no larger than a perfectly calibrated model's would be, 0 cannot be excluded (consistency resampling,
    https://doi.org/10.1175/WAF993.1).
    """
    low, high = percentile_interval(resampled)
    lower = 0.0 if ece <= np.quantile(null, 0.975) else max(0.0, 2 * ece - high)
    return min(lower, ece), min(1.0, max(ece, high, 2 * ece - low))


@dataclass(frozen=True)
class TemperatureFit:
    """One temperature, and what it did to the images that it was fitted on.

    Args:
        temperature: What logits are to be divided by: above 1 where the model was too sure.
        images: Images that it was fitted on.
        failed: Images that could not be read and are left out.
        nll_before: Negative log likelihood at temperature 1.
        nll_after: Likewise at the fitted one.
        ece_before: Expected calibration error at temperature 1.
        ece_after: Likewise at the fitted one.
    """

    temperature: float
    images: int
    failed: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def fit_temperature(predictions: Predictions) -> TemperatureFit:
    """The temperature that makes the true classes most likely.

    Args:
        predictions: On validation images, at temperature 1 and with every class allowed.

    Raises:
        DataError: If no image could be scored, or there is no best temperature: every image is right, say.

    Source:
        Temperature scaling: https://arxiv.org/abs/1706.04599. The loss is convex in 1/T: it has one minimum.
    """
    scored = predictions.scored
    root = predictions.index.root
    if not len(scored):
        raise DataError(
            f"none of the {len(predictions.index)} images in {root} could be read: no temperature."
        )
    log_probs = -negative_log(predictions.probs[scored])
    targets = predictions.index.labels[scored]
    true = log_probs[np.arange(len(targets)), targets]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float((logsumexp(log_probs * scale, axis=1) - true * scale).mean())

    bounds = (math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8, "maxiter": 200}).x
    right = int((log_probs.argmax(axis=1) == targets).sum())
    surer = right == len(scored) or found - bounds[0] < 1e-4
    if surer or bounds[1] - found < 1e-4:
        raise DataError(
            f"no temperature fits {root}: {right} of {len(scored)} images are right, and the likelihood "
            f"{'grows the surer' if surer else 'grows the less sure'} the model is made, without end. "
            "Calibrate on more images, of the kind that the model will see, that it was not trained on."
        )
    temperature = math.exp(found)
    before, after = predictions.probs[scored], tempered(log_probs, temperature)
    return TemperatureFit(
        temperature=temperature,
        images=len(scored),
        failed=len(predictions.errors),
        nll_before=loss(0.0),
        nll_after=loss(found),
        ece_before=_ece(before, targets),
        ece_after=_ece(after, targets),
    )


def tempered(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at another temperature.

    Args:
        log_probs: Logits, or logarithms of probabilities, shape ``(images, classes)``.
        temperature: What they are divided by.

    Example:
        >>> tempered(np.log([[0.8, 0.2]]), 2.0).round(3).tolist()
        [[0.667, 0.333]]
    """
    scaled = log_probs / temperature
    return np.exp(scaled - logsumexp(scaled, axis=1, keepdims=True))


def _ece(probs: np.ndarray, targets: np.ndarray) -> float:
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets
    gaps = np.bincount(equal_width_bins(confidence), right - confidence, ECE_BINS)
    return float(np.abs(gaps).sum() / len(targets))
