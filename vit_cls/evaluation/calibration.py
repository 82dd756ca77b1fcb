"""One temperature that mends probabilities: fitted on validation images, stored in the model file."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from vit_cls import formatting as fmt
from vit_cls.data.parts import ALL
from vit_cls.errors import ConfigError, DataError
from vit_cls.evaluation.predictions import Predictions, ScoredImages, images_for_model, predict_index
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import ImageClassifier
from vit_cls.stats.metrics import ECE_BINS, equal_width_bins, negative_log
from vit_cls.weights.bundle import MODEL_FILE, is_own_file, load_classifier, read_metadata, save_classifier

TEMPERATURES = (0.01, 100.0)
"""A fit that ends at one of these bounds has found nothing."""


@dataclass(frozen=True)
class TemperatureFit:
    """What logits are to be divided by, and the losses and ECE before and after, of so many images."""

    temperature: float
    images: int
    failed: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def fit_temperature(predictions: Predictions) -> TemperatureFit:
    """The temperature that makes the true classes most likely, from probabilities at temperature 1.

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
    options = {"xatol": 1e-8, "maxiter": 200}
    log_temperature = minimize_scalar(loss, bounds=bounds, method="bounded", options=options).x
    right = int((log_probs.argmax(axis=1) == targets).sum())
    at_lower = right == len(scored) or log_temperature - bounds[0] < 1e-4
    if at_lower or bounds[1] - log_temperature < 1e-4:
        raise DataError(
            f"no temperature fits {root}: {right} of {len(scored)} images are right, and the likelihood "
            f"grows without end the {'more' if at_lower else 'less'} confident the model is made. "
            "Calibrate on more images, of the kind that the model will see, that it was not trained on."
        )
    temperature = math.exp(log_temperature)
    before, after = predictions.probs[scored], tempered(log_probs, temperature)
    return TemperatureFit(
        temperature=temperature,
        images=len(scored),
        failed=len(predictions.errors),
        nll_before=loss(0.0),
        nll_after=loss(log_temperature),
        ece_before=_ece(before, targets),
        ece_after=_ece(after, targets),
    )


def tempered(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at another temperature, from logits or log-probabilities, shape ``(images, classes)``."""
    scaled = log_probs / temperature
    return np.exp(scaled - logsumexp(scaled, axis=1, keepdims=True))


def _ece(probs: np.ndarray, targets: np.ndarray) -> float:
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets
    gaps = np.bincount(equal_width_bins(confidence), right - confidence, ECE_BINS)
    return float(np.abs(gaps).sum() / len(targets))


def calibratable_file(model: str) -> Path:
    """The file that a temperature for ``--model`` is stored in; checked before any work.

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
    """Write the temperature into a model file, whose other content stays; ConfigError if that fails."""
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


def calibrate(
    classifier: ImageClassifier, file: Path, data: str, scored: ScoredImages, config: InferenceConfig
) -> TemperatureFit:
    """Fit on one view of every validation image, all classes allowed, store what was found, and use it.

    Args:
        file: From `calibratable_file`.
        data: The validation images, as ``--calibrate`` has them: the val part if there is one.
        scored: What is scored afterwards, which must be other images.

    Raises:
        ConfigError: If the images are those that are scored, or the file cannot be written.
        DataError: If no temperature can be fitted to them.
    """
    images = images_for_model(data, classifier, order=("val", ALL), name="--calibrate")
    fitted, index = images.source.index, scored.source.index
    if fitted.root.resolve() == index.root.resolve() and fitted.fingerprint() == index.fingerprint():
        raise ConfigError(
            f"--calibrate {data} are the images of --data, on which a temperature fitted to them "
            "would look better than it is. Give other images: those that validated the training."
        )
    classifier.temperature = 1.0
    fit = fit_temperature(predict_index(classifier, images.source, config))
    store_temperature(file, fit, data)
    classifier.temperature = fit.temperature
    return fit


def fit_text(fit: TemperatureFit, file: Path | None, data: str) -> list[str]:
    """Lines on what was fitted, for people; what follows is about the images that are scored.

    Args:
        data: The validation images, as the user wrote them.
    """
    return [
        f"temperature {fmt.decimals(fit.temperature)} fitted on {fit.images} images of {data} ({fit.failed} "
        f"could not be read), stored in {file}",
        f"  NLL there {fmt.decimals(fit.nll_before)} -> {fmt.decimals(fit.nll_after)}, "
        f"ECE {fmt.decimals(fit.ece_before)} -> {fmt.decimals(fit.ece_after)}; on the images "
        "that are scored:",
    ]
