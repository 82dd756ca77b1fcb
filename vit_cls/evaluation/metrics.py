"""Predictions to metrics: counts first, an interval with every proportion that is a headline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from vit_cls.errors import DataError
from vit_cls.evaluation.intervals import wilson_interval
from vit_cls.evaluation.predictions import Predictions

ECE_BINS = 15


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
    def precision(self) -> float | None:
        """Correct over predicted; None where the class was never predicted."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None where the class is absent on both sides."""
        total = self.support + self.predicted
        return 2 * self.correct / total if total else None


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

    @property
    def scored(self) -> int:
        """Images that have a prediction."""
        return self.images - self.failed

    @property
    def classes_present(self) -> int:
        """Classes of the model that the folder has images of."""
        return sum(row.support > 0 for row in self.per_class)


def evaluate_predictions(predictions: Predictions) -> Evaluation:
    """Compute every metric.

    Args:
        predictions: Of one classifier on one folder.

    Raises:
        DataError: If no image could be scored.

    Source:
        Top-k and calibration error: torchmetrics; ECE: https://arxiv.org/abs/1706.04599.
    """
    scored = predictions.scored
    if not len(scored):
        path, reason = next(iter(predictions.errors.items()))
        raise DataError(
            f"none of the {len(predictions.index)} images in {predictions.index.root} could be read; "
            f"the first: {predictions.index.paths[path]}: {reason}."
        )
    probs = torch.from_numpy(predictions.probs[scored])
    targets = torch.from_numpy(predictions.index.labels[scored])
    names = predictions.index.class_names
    classes = len(names)
    preds = probs.argmax(dim=1)
    confusion = torch.bincount(targets * classes + preds, minlength=classes * classes).view(classes, classes)
    correct = int(confusion.trace())
    per_class = [
        ClassMetrics(name, int(confusion[i].sum()), int(confusion[i, i]), int(confusion[:, i].sum()))
        for i, name in enumerate(names)
    ]
    recalls = [row.recall for row in per_class if row.recall is not None]
    true_probs = probs[torch.arange(len(targets)), targets].clamp_min(torch.finfo(torch.float64).tiny)
    return Evaluation(
        images=len(predictions.index),
        failed=len(predictions.errors),
        correct=correct,
        top1=correct / len(scored),
        top1_ci95=wilson_interval(correct, len(scored)),
        top5=float(multiclass_accuracy(probs, targets, classes, top_k=min(5, classes), average="micro")),
        balanced_accuracy=float(np.mean(recalls)),
        nll=float(-true_probs.log().mean()),
        ece=float(multiclass_calibration_error(probs, targets, classes, n_bins=ECE_BINS, norm="l1")),
        per_class=per_class,
        confusion=confusion.numpy(),
        seconds=predictions.seconds,
    )
