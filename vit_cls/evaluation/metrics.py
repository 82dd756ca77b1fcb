"""Predictions to metrics: counts first, an interval with every proportion that is a headline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from vit_cls.errors import DataError
from vit_cls.evaluation.calibration import Calibration, measure_calibration, negative_log
from vit_cls.evaluation.predictions import AS_IS, Predictions, Scoring
from vit_cls.stats.intervals import wilson_interval


@dataclass(frozen=True)
class ClassMetrics:
    """How one class fared.

    Args:
        name: The class.
        support: Scored images of that class.
        correct: How many of them were given that class.
        predicted: How many images of any class were.
    """

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
    """One class taken for another.

    Args:
        label: The true class.
        prediction: What it was taken for.
        images: How often.
        support: Scored images of the true class.
    """

    label: str
    prediction: str
    images: int
    support: int


@dataclass(frozen=True)
class Evaluation:
    """The truth about a classifier on a folder.

    Args:
        images: Images of the folder: scored and failed.
        failed: Images that could not be read.
        correct: Scored images whose class was the first prediction.
        top1: Correct over scored.
        top1_ci95: Wilson's 95 % interval of ``top1``.
        top5: Share of scored images whose class was among the first five (or all, where there are fewer).
        balanced_accuracy: Mean recall of the classes that the folder has.
        nll: Mean negative log likelihood, in nats.
        ece: Expected calibration error, 15 bins of equal width.
        per_class: One row for each class of the model.
        confusion: Images by true class (rows) and predicted class (columns).
        seconds: Wall time of loading and predicting.
        scoring: How the images became probabilities.
        calibration: How far those can be believed; None where it was not measured.
    """

    images: int
    failed: int
    correct: int
    top1: float
    top1_ci95: tuple[float, float]
    top5: float
    balanced_accuracy: float
    nll: float
    ece: float
    per_class: list[ClassMetrics]
    confusion: np.ndarray
    seconds: float
    scoring: Scoring = AS_IS
    calibration: Calibration | None = None

    @property
    def scored(self) -> int:
        """Images that have a prediction."""
        return self.images - self.failed

    @property
    def classes_present(self) -> int:
        """Classes of the model that the folder has images of."""
        return sum(row.support > 0 for row in self.per_class)

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


def evaluate_predictions(predictions: Predictions, *, seed: int = 0) -> Evaluation:
    """Compute every metric.

    Args:
        predictions: Of one classifier on one folder.
        seed: Of the resampling that the bootstrap intervals come from.

    Raises:
        DataError: If no image could be scored.

    Source:
        Top-k accuracy and confusion matrix: torchmetrics.
    """
    scored = predictions.scored
    if not len(scored):
        path, reason = next(iter(predictions.errors.items()))
        raise DataError(
            f"none of the {len(predictions.index)} images in {predictions.index.root} could be read; "
            f"the first: {predictions.index.paths[path]}: {reason}."
        )
    probs, targets = predictions.probs[scored], predictions.index.labels[scored]
    given, wanted = torch.from_numpy(probs), torch.from_numpy(targets)
    names = predictions.index.class_names
    classes = len(names)
    # The first of equals, as predictions.csv has it.
    preds = torch.from_numpy(probs.argmax(axis=1))
    confusion = multiclass_confusion_matrix(preds, wanted, classes, validate_args=False).numpy()
    correct = int(confusion.trace())
    per_class = [
        ClassMetrics(name, int(confusion[i].sum()), int(confusion[i, i]), int(confusion[:, i].sum()))
        for i, name in enumerate(names)
    ]
    recalls = [row.recall for row in per_class if row.recall is not None]
    top5 = multiclass_accuracy(given, wanted, classes, top_k=min(5, classes), average="micro")
    calibration = measure_calibration(probs, targets, seed=seed)
    return Evaluation(
        images=len(predictions.index),
        failed=len(predictions.errors),
        correct=correct,
        top1=correct / len(scored),
        top1_ci95=wilson_interval(correct, len(scored)),
        top5=round(float(top5) * len(scored)) / len(scored),  # torchmetrics' is float32
        balanced_accuracy=float(np.mean(recalls)),
        nll=float(negative_log(probs[np.arange(len(targets)), targets]).mean()),
        ece=calibration.ece,
        per_class=per_class,
        confusion=confusion,
        seconds=predictions.seconds,
        scoring=predictions.scoring,
        calibration=calibration,
    )
