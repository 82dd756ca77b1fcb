"""The tables that ``evaluate --output`` leaves: one row an image, one row a class."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vit_cls.errors import ConfigError
from vit_cls.evaluation.metrics import Evaluation
from vit_cls.evaluation.predictions import Predictions
from vit_cls.files import write_text

PREDICTION_COLUMNS = ("path", "label", "prediction", "probability", "correct", "error")
CLASS_COLUMNS = ("class", "support", "correct", "predicted", "precision", "recall", "f1")


def check_output(output: str | None) -> Path | None:
    """Make sure, before any work, that files can be written to ``--output``; creates nothing.

    Args:
        output: The folder as the user wrote it, or None.

    Returns:
        The folder, or None.

    Raises:
        ConfigError: If it is a file, or cannot be made or written.
    """
    if output is None:
        return None
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output} is a file. Give a folder; it is made if it does not exist.")
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output {output} cannot be written: {nearest} does not allow it. Choose another folder."
        )
    return folder


def write_tables(folder: Path, predictions: Predictions, result: Evaluation) -> None:
    """Write ``predictions.csv`` and ``per_class.csv``; files of those names are replaced.

    Args:
        folder: Is made if it does not exist.
        predictions: Of every image.
        result: Of every class.

    Raises:
        ConfigError: If the folder cannot be written or is full; complete files stay.
    """
    rows = (
        [r.name, r.support, r.correct, r.predicted, r.precision, r.recall, r.f1] for r in result.per_class
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "predictions.csv", _csv(PREDICTION_COLUMNS, _prediction_rows(predictions)))
        write_text(folder / "per_class.csv", _csv(CLASS_COLUMNS, rows))
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror or error}.") from error


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
