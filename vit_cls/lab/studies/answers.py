"""What the models of finished trainings said about each image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_cls.errors import RunError
from vit_cls.lab.studies.trials import ANSWERS, DONE, MODEL, Trial, trial_folder
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.factory import load


class Answers:
    """What the models of finished trials said about each image.

    Whatever needs a trial's model or its answers raises a `RunError` where its training failed.

    Args:
        folder: Folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._notes: dict[str, dict[str, Any]] = {}
        self._positions: np.ndarray | None = None

    def note(self, trial: Trial) -> dict[str, Any]:
        """What the trial left about itself: costs, seconds, counts, ``error`` where it failed."""
        if trial.key not in self._notes:
            text = (trial_folder(self.folder, trial) / DONE).read_text(encoding="utf-8")
            self._notes[trial.key] = json.loads(text)
        return self._notes[trial.key]

    def failed(self, trial: Trial) -> str | None:
        """Why a training failed, or None."""
        return self.note(trial).get("error")

    def model(self, trial: Trial) -> ImageClassifier:
        """The trained classifier, in evaluation mode on the CPU."""
        self._refuse_failed(trial)
        return load(trial_folder(self.folder, trial) / MODEL)

    def probs(self, trial: Trial, part: str = "test") -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of the images of ``val`` or ``test``, and their true classes.

        Returns:
            float32, shape ``(images, classes)``, and int64, shape ``(images,)``.

        Raises:
            RunError: If it answered for other test images than the trials before.
        """
        self._refuse_failed(trial)
        with np.load(trial_folder(self.folder, trial) / ANSWERS, allow_pickle=False) as arrays:
            if part == "test":
                self._refuse_others(trial, arrays["test_positions"])
            return arrays[f"{part}_probs"], arrays[f"{part}_targets"]

    def correct(self, trials: Sequence[Trial]) -> np.ndarray:
        """Which test images each model classified right, bool, shape ``(trials, images)``."""
        rows = [self.probs(trial) for trial in trials]
        return np.stack([probs.argmax(axis=1) == targets for probs, targets in rows])

    def val_accuracy(self, trials: Sequence[Trial]) -> float:
        """Mean share of right validation images, which differ by seed; what choices are made by."""
        rows = [self.probs(trial, "val") for trial in trials]
        return float(np.mean([(probs.argmax(axis=1) == targets).mean() for probs, targets in rows]))

    def seconds(self, trials: Sequence[Trial]) -> float:
        """The median time of a training."""
        return float(np.median([self.note(trial)["seconds"] for trial in trials]))

    def predictions(self, arms: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
        """Per-image predictions on the test images, from which every statistic can be done again."""
        first = next(iter(arms.values()))[0]
        parts = first.data.parts(first.seed)
        with np.load(trial_folder(self.folder, first) / ANSWERS, allow_pickle=False) as arrays:
            positions = arrays["test_positions"].tolist()
        return {
            "class_names": parts.class_names,
            "paths": [parts.test.index.paths[i] for i in positions],
            "targets": self.probs(first)[1].tolist(),
            "predictions": {
                arm: {str(trial.seed): self.probs(trial)[0].argmax(axis=1).tolist() for trial in trials}
                for arm, trials in arms.items()
            },
        }

    def _refuse_others(self, trial: Trial, positions: np.ndarray) -> None:
        """Everything here is paired by image."""
        if self._positions is None:
            self._positions = positions
        if not np.array_equal(positions, self._positions):
            raise RunError(
                f"the training {trial.key} answered for {len(positions)} test images, others for "
                f"{len(self._positions)}, and not for the same ones: some file could not be read every time. "
                "Mend or remove it (`vit-cls doctor` names it), and give a new --output."
            )

    def _refuse_failed(self, trial: Trial) -> None:
        error = self.failed(trial)
        if error is not None:
            raise RunError(
                f"the training {trial.key} failed: {error} Mend the cause (often --recipe.lr), delete "
                f"{trial_folder(self.folder, trial)} and run the study again; the others are kept."
            )
