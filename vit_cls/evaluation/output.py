"""What ``evaluate`` hands over: a JSON object, lines to read, tables of images and of classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_cls.evaluation.calibration import ECE_BINS
from vit_cls.evaluation.metrics import Evaluation
from vit_cls.evaluation.predictions import Predictions
from vit_cls.files import write_text

PREDICTION_COLUMNS = ("path", "label", "prediction", "probability", "correct", "error")
CLASS_COLUMNS = (
    *("class", "support", "correct", "predicted", "precision", "recall", "f1"),
    *("recall_ci95_low", "recall_ci95_high"),
)
MOST_CONFUSED = 20


@dataclass(frozen=True)
class ImageCase:
    """One image that is worth a look.

    Args:
        path: Relative to the folder.
        label: Its class.
        prediction: The class that it was given.
        confidence: The probability of that class.
        label_probability: The probability of its own class.
    """

    path: str
    label: str
    prediction: str
    confidence: float
    label_probability: float


def worst_images(predictions: Predictions, most: int) -> list[ImageCase]:
    """Images that were given a wrong class, the surest first.

    Args:
        predictions: Of every image.
        most: How many at most.
    """
    scored = predictions.scored
    probs = predictions.probs[scored]
    wrong = probs.argmax(axis=1) != predictions.index.labels[scored]
    order = np.argsort(-probs.max(axis=1)[wrong], kind="stable")[:most]
    return _cases(predictions, scored[wrong][order])


def uncertain_images(predictions: Predictions, most: int) -> list[ImageCase]:
    """Images whose prediction is the least sure, whether right or wrong.

    Args:
        predictions: Of every image.
        most: How many at most.
    """
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


def to_dict(result: Evaluation) -> dict[str, Any]:
    """The result as plain data that JSON can hold.

    Args:
        result: Of a folder, with its calibration.
    """
    scoring, calibration = result.scoring, result.calibration
    assert calibration is not None
    return {
        "images": result.images,
        "failed": result.failed,
        "scored": result.scored,
        "correct": result.correct,
        "top1": result.top1,
        "top1_ci95": list(result.top1_ci95),
        "top5": result.top5,
        "balanced_accuracy": result.balanced_accuracy,
        "nll": result.nll,
        "nll_ci95": list(calibration.nll_ci95),
        "brier": calibration.brier,
        "brier_ci95": list(calibration.brier_ci95),
        "ece": result.ece,
        "ece_ci95": list(calibration.ece_ci95),
        "ece_equal_mass": calibration.ece_equal_mass,
        "ece_equal_mass_ci95": list(calibration.ece_equal_mass_ci95),
        "accuracy_at_coverage": [vars(point) for point in calibration.coverage],
        "aurc": calibration.aurc,
        "most_confused": [vars(pair) for pair in result.confused_pairs()[:MOST_CONFUSED]],
        "calibrated": scoring.calibrated,
        "temperature": scoring.temperature,
        "restricted": scoring.restricted,
        "tta": scoring.tta,
        "exact": scoring.exact,
        "seed": calibration.seed,
        "seconds": round(result.seconds, 3),
        "images_per_second": round(result.images / result.seconds, 1),
        "classes": len(result.per_class),
        "classes_present": result.classes_present,
    }


def to_text(result: Evaluation) -> str:
    """The result as lines for people; counts first.

    Args:
        result: Of a folder, with its calibration.
    """
    scoring, calibration = result.scoring, result.calibration
    assert calibration is not None
    missing = [row.name for row in result.per_class if not row.support]
    coverage = f"; {result.classes_present} of the model's {len(result.per_class)} classes" if missing else ""
    k = min(5, len(result.per_class))

    def line(name: str, value: float, bounds: tuple[float, float] | None = None) -> str:
        doubt = f"   95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
        return f"{name:<19}{value:.4f}{doubt}"

    lines = [
        f"{result.correct} of {result.scored} images right ({result.failed} could not be read{coverage})",
        line("top-1", result.top1, result.top1_ci95),
        line(f"top-{k}", result.top5),
        line("balanced accuracy", result.balanced_accuracy),
        line("NLL", result.nll, calibration.nll_ci95),
        line("Brier", calibration.brier, calibration.brier_ci95),
        line(f"ECE ({ECE_BINS} bins)", result.ece, calibration.ece_ci95),
        line("  of equal mass", calibration.ece_equal_mass, calibration.ece_equal_mass_ci95),
        "accuracy of the most confident: "
        + ", ".join(f"{100 * p.coverage:g} %: {p.accuracy:.4f}" for p in calibration.coverage),
    ]
    if pairs := result.confused_pairs()[:3]:
        told = (f"{pair.label} taken for {pair.prediction} {pair.images}x" for pair in pairs)
        lines.append(f"most confused: {', '.join(told)}")
    lines.append(
        f"probabilities are {'' if scoring.calibrated else 'not '}calibrated"
        + (f", temperature {scoring.temperature:.4f}" if scoring.calibrated else "")
        + ("; predictions restricted to the folder's classes" if scoring.restricted else "")
        + ("" if scoring.tta == "none" else f"; test-time augmentation: {scoring.tta}")
        + ("; resized by Pillow" if scoring.exact else "")
    )
    lines.append(f"{result.images / result.seconds:.0f} images/s")
    if missing:
        lines.append(f"no images of: {', '.join(missing[:20])}{' ...' if len(missing) > 20 else ''}")
    return "\n".join(lines)


def write_tables(folder: Path, predictions: Predictions, result: Evaluation) -> None:
    """Write ``predictions.csv`` and ``per_class.csv``; files of those names are replaced.

    Args:
        folder: Exists.
        predictions: Of every image.
        result: Of every class.

    Raises:
        OSError: If a file cannot be written; complete files stay.
    """
    rows = (
        [r.name, r.support, r.correct, r.predicted, r.precision, r.recall, r.f1, *(r.recall_ci95 or ("", ""))]
        for r in result.per_class
    )
    write_text(folder / "predictions.csv", _csv(PREDICTION_COLUMNS, _prediction_rows(predictions)))
    write_text(folder / "per_class.csv", _csv(CLASS_COLUMNS, rows))


def _prediction_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    index, names = predictions.index, predictions.index.class_names
    for i in range(len(index)):
        label = int(index.labels[i])
        if i in predictions.errors:
            yield index.paths[i], names[label], "", "", "", predictions.errors[i]
            continue
        best = int(predictions.probs[i].argmax())
        probability = f"{predictions.probs[i, best]:.6f}"
        yield index.paths[i], names[label], names[best], probability, int(best == label), ""


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in row])
    return buffer.getvalue()
