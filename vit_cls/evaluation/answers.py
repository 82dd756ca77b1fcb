"""One model's first prediction for each image, from a run of the model or from its predictions.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vit_cls.errors import DataError
from vit_cls.evaluation.predictions import Predictions

COLUMNS = ("path", "label", "prediction", "probability")


@dataclass(frozen=True)
class Answers:
    """What a model said about each image, by the names of the classes.

    Args:
        name: The model.
        paths: Relative paths, each once.
        labels: True class of each image.
        predictions: Predicted class of each image; empty where the image could not be read.
        probabilities: Of the predicted class; NaN where the image could not be read.
    """

    name: str
    paths: Sequence[str]
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray

    @property
    def failed(self) -> np.ndarray:
        """Whether an image has no prediction, bool."""
        return self.predictions == ""

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction is the true class, bool."""
        return self.predictions == self.labels


def answers_of(name: str, predictions: Predictions) -> Answers:
    """The first prediction for each image of a folder.

    Args:
        name: The model.
        predictions: Of the model, with probabilities of all classes.
    """
    names = np.array(predictions.index.class_names, dtype=object)
    best = np.nan_to_num(predictions.probs, nan=-1.0).argmax(axis=1)
    chosen, probabilities = names[best], predictions.probs[np.arange(len(best)), best].copy()
    failed = np.fromiter(predictions.errors, dtype=np.int64)
    chosen[failed], probabilities[failed] = "", math.nan
    return Answers(name, predictions.index.paths, names[predictions.index.labels], chosen, probabilities)


def read_answers(path: str, *, name: str | None = None) -> Answers:
    """Read a ``predictions.csv`` that ``evaluate --output`` wrote.

    Args:
        path: The file, or the folder that holds it.
        name: What to call the model; None takes ``path``.

    Raises:
        DataError: If it cannot be read, is no such file, or names an image twice.
    """
    file = Path(path)
    file = file / "predictions.csv" if file.is_dir() else file
    wrong = f"--predictions {path} is no predictions.csv of `vit-cls evaluate --output`"
    rows: dict[str, tuple[str, str, float]] = {}
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
            if missing:
                raise DataError(f"{wrong}: it has no column {', '.join(missing)}.")
            for row in reader:
                image, label, prediction, written = (row[column] for column in COLUMNS)
                where = f"{wrong}: line {reader.line_num}"
                if not image or not label or prediction is None or written is None:
                    raise DataError(f"{where} is not complete.")
                if image in rows:
                    raise DataError(f"{where} names {image} a second time.")
                try:
                    probability = float(written) if prediction else math.nan
                except ValueError:
                    raise DataError(f"{where} has the probability {written!r}, not a number.") from None
                rows[image] = (label, prediction, probability)
    except OSError as error:
        raise DataError(f"--predictions {path} cannot be read: {error.strerror or error}.") from error
    except csv.Error as error:
        raise DataError(f"{wrong}: {error}.") from error
    if not rows:
        raise DataError(f"{wrong}: it has no rows.")
    labels, predictions, probabilities = zip(*rows.values(), strict=True)
    return Answers(
        name or path,
        list(rows),
        np.array(labels, dtype=object),
        np.array(predictions, dtype=object),
        np.array(probabilities),
    )


def align(answers: Sequence[Answers]) -> list[Answers]:
    """Put every model's answers in the order of the first's images, under names that differ.

    Args:
        answers: Of two or more models.

    Raises:
        DataError: If they are not about the same images with the same true classes, or a model has no
            prediction at all.
    """
    first = answers[0]
    aligned: list[Answers] = []
    for one in answers:
        place = {path: i for i, path in enumerate(one.paths)}
        _refuse_other_images(first, one, place)
        order = np.array([place[path] for path in first.paths])
        labels, predictions = one.labels[order], one.predictions[order]
        differ = np.flatnonzero(labels != first.labels)
        if len(differ):
            i = int(differ[0])
            raise DataError(
                f"{first.name} and {one.name} must agree on the true class of every image; they differ on "
                f"{len(differ)}, the first: {first.paths[i]} is {first.labels[i]!r} in the one and "
                f"{labels[i]!r} in the other."
            )
        if one.failed.all():
            raise DataError(f"{one.name} has no prediction for any of {len(labels)} images.")
        used, name, number = {other.name for other in aligned}, one.name, 1
        while name in used:
            number += 1
            name = f"{one.name} ({number})"
        aligned.append(
            replace(
                one,
                name=name,
                paths=first.paths,
                labels=labels,
                predictions=predictions,
                probabilities=one.probabilities[order],
            )
        )
    return aligned


def _refuse_other_images(first: Answers, one: Answers, place: dict[str, int]) -> None:
    known = set(first.paths)
    lacking = [path for path in first.paths if path not in place]
    extra = [path for path in one.paths if path not in known]
    if not lacking and not extra:
        return
    only = [
        f"{len(paths)} only in {name} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
        for paths, name in ((lacking, first.name), (extra, one.name))
        if paths
    ]
    raise DataError(
        f"{first.name} and {one.name} must be about the same images; {' and '.join(only)}. "
        f"Evaluate both on one folder."
    )
