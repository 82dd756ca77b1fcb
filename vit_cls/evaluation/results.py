"""What ``evaluate`` finds: counts and metrics, as a dataclass, as JSON, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls.errors import DataError
from vit_cls.evaluation.predictions import AS_IS, Predictions, Scoring
from vit_cls.evaluation.row_formats import PREDICTION_COLUMNS, as_record, csv_line
from vit_cls.stats.intervals import wilson_interval
from vit_cls.stats.metrics import (
    METRICS,
    TOP_K,
    Calibration,
    Estimate,
    Metric,
    Scored,
    calibration_of,
    measure,
)

CLASS_COLUMNS = (
    *("class", "support", "correct", "predicted", "precision", "recall", "f1"),
    *("recall_ci95_low", "recall_ci95_high"),
)
MOST_CONFUSED = 20


@dataclass(frozen=True)
class ClassMetrics:
    """How one class fared: its images, those that were given it, and all images of any class that were."""

    name: str
    support: int
    correct: int
    predicted: int

    @property
    def recall(self) -> float | None:
        """Correct over support; None where the folder has no image of the class."""
        return self.correct / self.support if self.support else None

    @property
    def recall_ci95(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the recall; None where the folder has no image of the class."""
        return wilson_interval(self.correct, self.support) if self.support else None

    @property
    def precision(self) -> float | None:
        """Correct over predicted; None where the class was never predicted."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None where the class is absent on both sides."""
        total = self.support + self.predicted
        return 2 * self.correct / total if total else None


@dataclass(frozen=True)
class ConfusedPair:
    """One class taken for another so many times, of so many scored images of the true class."""

    label: str
    prediction: str
    images: int
    support: int


@dataclass(frozen=True)
class Evaluation:
    """Counts and metrics of a classifier on a folder.

    Args:
        images: Images of the folder: scored and failed.
        metrics: By key, in the order of `vit_cls.stats.metrics.METRICS`; ``top1`` at least.
        per_class: One row for each class of the model.
        confusion: Images by true class (rows) and predicted class (columns).
        calibration: How far the probabilities can be believed.
        seconds: Wall time of loading and predicting.
    """

    images: int
    failed: int
    correct: int
    metrics: dict[str, Estimate]
    per_class: list[ClassMetrics]
    confusion: np.ndarray
    calibration: Calibration
    seconds: float
    scoring: Scoring = AS_IS

    @property
    def top1(self) -> Estimate:
        """Correct over scored, with Wilson's interval."""
        return self.metrics["top1"]

    @property
    def scored(self) -> int:
        """Images that have a prediction."""
        return self.images - self.failed

    @property
    def classes_present(self) -> int:
        """Classes of the model that the folder has images of."""
        return sum(row.support > 0 for row in self.per_class)

    def named_metrics(self) -> list[tuple[Metric, str, str, Estimate]]:
        """Row of the table, title, meaning and estimate of each metric, for people."""
        k = min(TOP_K, len(self.per_class))
        rows = [(METRICS[key], estimate) for key, estimate in self.metrics.items()]
        return [(row, row.title.format(k=k), row.meaning.format(k=k), estimate) for row, estimate in rows]

    def confused_pairs(self) -> list[ConfusedPair]:
        """Pairs that were confused, the most frequent first, then in class order."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        rows, columns = np.nonzero(wrong)
        order = np.argsort(-wrong[rows, columns], kind="stable")
        classes = self.per_class
        return [
            ConfusedPair(classes[i].name, classes[j].name, int(wrong[i, j]), classes[i].support)
            for i, j in zip(rows[order], columns[order], strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data that JSON can hold."""
        scoring, calibration = self.scoring, self.calibration
        told: dict[str, Any] = {
            "images": self.images,
            "failed": self.failed,
            "scored": self.scored,
            "correct": self.correct,
        }
        for key, estimate in self.metrics.items():
            if key == "aurc":  # points of the curve stand before its area
                told["accuracy_at_coverage"] = [vars(point) for point in calibration.coverage]
            told[key] = estimate.value
            if estimate.ci95 is not None:
                told[f"{key}_ci95"] = list(estimate.ci95)
        return told | {
            "most_confused": [vars(pair) for pair in self.confused_pairs()[:MOST_CONFUSED]],
            "calibrated": scoring.calibrated,
            "temperature": scoring.temperature,
            "restricted": scoring.restricted,
            "tta": scoring.tta,
            "exact": scoring.exact,
            "device": scoring.device,
            "device_name": scoring.device_name,
            "precision": scoring.precision,
            "seed": calibration.seed,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images / self.seconds, 1),
            "classes": len(self.per_class),
            "classes_present": self.classes_present,
        }


def evaluate_predictions(predictions: Predictions, *, seed: int = 0) -> Evaluation:
    """Compute every metric.

    Args:
        predictions: Of one classifier on one folder.
        seed: Of the resampling that the bootstrap intervals come from.

    Raises:
        DataError: If no image could be scored.
    """
    scored = predictions.scored
    if not len(scored):
        path, reason = next(iter(predictions.errors.items()))
        raise DataError(
            f"none of the {len(predictions.index)} images in {predictions.index.root} could be read; "
            f"the first: {predictions.index.paths[path]}: {reason}."
        )
    answers = Scored(predictions.probs[scored], predictions.index.labels[scored], seed)
    confusion = answers.confusion
    per_class = [
        ClassMetrics(name, int(confusion[i].sum()), int(confusion[i, i]), int(confusion[:, i].sum()))
        for i, name in enumerate(predictions.index.class_names)
    ]
    return Evaluation(
        images=len(predictions.index),
        failed=len(predictions.errors),
        correct=int(answers.right.sum()),
        metrics=measure(answers),
        per_class=per_class,
        confusion=confusion,
        calibration=calibration_of(answers),
        seconds=predictions.seconds,
        scoring=predictions.scoring,
    )


@dataclass(frozen=True)
class ImageCase:
    """One image of the report's galleries.

    Args:
        label_probability: The probability of its own class.
    """

    path: str
    label: str
    prediction: str
    confidence: float
    label_probability: float


def worst_images(predictions: Predictions, most: int) -> list[ImageCase]:
    """Images that were given a wrong class, the most confident first; so many at most."""
    scored = predictions.scored
    probs = predictions.probs[scored]
    wrong = probs.argmax(axis=1) != predictions.index.labels[scored]
    order = np.argsort(-probs.max(axis=1)[wrong], kind="stable")[:most]
    return _cases(predictions, scored[wrong][order])


def uncertain_images(predictions: Predictions, most: int) -> list[ImageCase]:
    """Images whose prediction is the least confident, right or wrong; so many at most."""
    scored = predictions.scored
    return _cases(
        predictions, scored[np.argsort(predictions.probs[scored].max(axis=1), kind="stable")[:most]]
    )


def _cases(predictions: Predictions, positions: np.ndarray) -> list[ImageCase]:
    index, names = predictions.index, predictions.index.class_names
    cases = []
    for i in positions.tolist():
        best, label = int(predictions.probs[i].argmax()), int(index.labels[i])
        confidence, own = (float(predictions.probs[i, k]) for k in (best, label))
        cases.append(ImageCase(index.paths[i], names[label], names[best], confidence, own))
    return cases


def tables(predictions: Predictions, result: Evaluation) -> Iterator[tuple[str, str]]:
    """Name and text of ``predictions.csv`` and ``per_class.csv``.

    Args:
        result: Of these predictions.
    """
    images = (as_record(row, top_k=1).values() for row in predictions.rows())
    yield "predictions.csv", "".join(map(csv_line, [PREDICTION_COLUMNS, *images]))
    classes = (
        [r.name, r.support, r.correct, r.predicted, r.precision, r.recall, r.f1, *(r.recall_ci95 or ("", ""))]
        for r in result.per_class
    )
    yield "per_class.csv", "".join(map(csv_line, [CLASS_COLUMNS, *classes]))
