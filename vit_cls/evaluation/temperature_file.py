"""A temperature into the model file that it belongs to; nothing else in the file changes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from vit_cls.errors import ConfigError
from vit_cls.evaluation.calibration import TemperatureFit
from vit_cls.weights.bundle import MODEL_FILE, is_own_file, load_classifier, read_metadata, save_classifier


def calibratable_file(model: str) -> Path:
    """The file that a temperature for ``--model`` is stored in; checked before any work.

    Args:
        model: As the user named it.

    Raises:
        ConfigError: If it is no model file of ours, or cannot be replaced.
    """
    path = Path(model)
    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file() or path.suffix == ".ckpt" or not is_own_file(path):
        raise ConfigError(
            f"--calibrate stores the temperature in the model file, and --model {model} has none that can "
            f"hold it. Give a run folder, or the {MODEL_FILE} that `vit-cls fit` or `vit-cls export` wrote."
        )
    path = path.resolve()  # a link stays a link
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--calibrate stores the temperature in {path}, but its folder cannot be written. Copy the model "
            "to a folder of yours, and calibrate the copy."
        )
    return path


def store_temperature(path: Path, fit: TemperatureFit, data: str) -> None:
    """Write the temperature into a model file; the weights and the rest of the metadata stay.

    Args:
        path: The model file; the old one stays until the new one is complete.
        fit: The temperature, and how it was found.
        data: The validation folder as the user named it.

    Raises:
        ConfigError: If the file cannot be written; the old one stays.
    """
    metadata = read_metadata(path)
    classifier = load_classifier(path)
    classifier.temperature = fit.temperature
    extra = {key: value for key, value in metadata.items() if key not in classifier.to_metadata()}
    extra["calibration"] = {"data": data, **dataclasses.asdict(fit)}
    try:
        save_classifier(classifier, path, extra=extra)
    except OSError as error:
        raise ConfigError(
            f"the temperature cannot be stored in {path}: {error.strerror or error}. The file is as it was."
        ) from error
