"""A classifier's answer for every image of a folder, or for files as they come; failures included."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_cls.checks import check_choice
from vit_cls.data.dataset import ImageSource
from vit_cls.data.folders import SCORED, find_parts
from vit_cls.data.index import ImageIndex
from vit_cls.data.parts import ALL
from vit_cls.errors import ConfigError, DataError
from vit_cls.inference import InferenceConfig, Outputs, batches, require_head
from vit_cls.model.classifier import ImageClassifier

TTAS = ("none", "flip")
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Scoring:
    """How images became probabilities; what a result must say of itself.

    Args:
        temperature: What logits were divided by; 1 where nothing was fitted.
        restricted: Whether only classes that the folder has could be predicted.
        tta: Test-time augmentation: ``none``, or ``flip``: the mean of an image and its mirror image.
        exact: Whether images were resized by Pillow, as timm's loader does it.
        device: Where the model ran, such as ``cuda``; None where that is not known.
        device_name: Of a GPU.
        precision: What it computed with: ``32``, ``bf16`` or ``fp16``.
    """

    temperature: float = 1.0
    restricted: bool = False
    tta: str = "none"
    exact: bool = False
    device: str | None = None
    device_name: str | None = None
    precision: str | None = None

    @property
    def computed(self) -> str:
        """Where and with what the model ran, for people; empty where that is not known."""
        name = "" if self.device_name is None else f" ({self.device_name})"
        return "" if self.device is None else f"computed on {self.device}{name}, precision {self.precision}"

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted on validation images."""
        return self.temperature != 1.0


AS_IS = Scoring()


@dataclass(frozen=True)
class Row:
    """What a classifier said about one image.

    Args:
        path: As it was given; relative to the root for an image of an index.
        best: Classes and their probabilities, the likeliest first; empty where the file could not be read.
        label: The true class, where it is known.
    """

    path: str
    best: tuple[tuple[str, float], ...]
    error: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Predictions:
    """What a classifier said about each image of an index.

    Args:
        index: The images, labelled by the classifier's classes.
        probs: Probabilities, float64, shape ``(images, classes)``; NaN where the image failed.
        errors: Why an image has no prediction, by its position.
        seconds: Wall time of loading and predicting.
    """

    index: ImageIndex
    probs: np.ndarray
    errors: dict[int, str]
    seconds: float
    scoring: Scoring = AS_IS

    @property
    def scored(self) -> np.ndarray:
        """Positions of the images that have a prediction."""
        return np.array([i for i in range(len(self.index)) if i not in self.errors], dtype=np.int64)

    def rows(self) -> Iterator[Row]:
        """The first prediction for each image, in the order of the index."""
        names, preds = self.index.class_names, self.probs.argmax(axis=1).tolist()
        for i, (path, label, pred) in enumerate(zip(self.index.paths, self.index.labels, preds, strict=True)):
            if i in self.errors:
                yield Row(path, (), self.errors[i], names[label])
            else:
                yield Row(path, ((names[pred], float(self.probs[i, pred])),), None, names[label])


@dataclass(frozen=True)
class ScoredImages:
    """The images that a model is scored on.

    Args:
        source: The images, labelled by the model's classes.
        split: The part of the data that they are: ``train``, ``val``, ``test``, or ``all``.
        origin: Where they are, in words.
    """

    source: ImageSource
    split: str
    origin: str

    @property
    def words(self) -> str:
        """What they are, for people."""
        return f"scored on {self.origin}" if self.split == ALL else f"scored on {self.split}: {self.origin}"


def images_for_model(
    data: str | Path,
    classifier: ImageClassifier,
    *,
    split: str | None = None,
    order: Sequence[str] = SCORED,
    name: str = "--data",
) -> ScoredImages:
    """Find the images to score a model on, with the labels of its classes.

    Args:
        data: See `vit_cls.data.folders.find_parts`. Classes of the model may be missing, others may not be
            there. Where the model's classes are WordNet ids, labels may be the ImageNet names instead.
        split: The part to take.
        order: Without it, the first of these that the data has: test if there is one, else val, else
            everything.
        name: What the user called the data, for error messages.

    Raises:
        DataError: If the images cannot be used, or have classes that the model lacks.
        ConfigError: If the data has no such part.
        ModelFileError: If the model has no head.
    """
    require_head(classifier)
    parts = find_parts(data, name=name, class_names=classifier.class_names)
    part = parts.choose(split, order)
    source = parts.read(part)
    known = canonical_classes(source.index.class_names, classifier.class_names, name=f"{name} {data}")
    where = parts.where(part)
    named = replace(source.index, class_names=known)
    source.index = named.with_class_names(classifier.class_names, where=where)
    return ScoredImages(source, part, where)


def canonical_classes(folders: Sequence[str], class_names: Sequence[str], *, name: str) -> list[str]:
    """The model's name of each class folder, where a folder has another of the names of an ImageNet class.

    Raises:
        DataError: If a name is that of several classes, or two folders are one class.

    Example:
        >>> canonical_classes(["tench", "n01443537", "dog"], ["n01440764", "n01443537"], name="photos")
        ['n01440764', 'n01443537', 'dog']
    """
    exact = set(class_names)
    known = {folder: folder for folder in folders}
    if not exact.issuperset(folders):
        from vit_cls.weights.timm_models import class_aliases  # imports timm: seconds, for ImageNet alone

        aliases: dict[str, set[str]] = {}
        for class_name in filter(WORDNET_ID.fullmatch, class_names):
            for alias in class_aliases(class_name):
                aliases.setdefault(_folded(alias), set()).add(class_name)
        for folder in folders:
            meant = sorted(aliases.get(_folded(folder), ()) if folder not in exact else ())
            if len(meant) > 1:
                raise DataError(
                    f"{name}: the folder {folder} may be any of the classes {', '.join(meant)}. Rename it to "
                    "the one that is meant."
                )
            known[folder] = meant[0] if meant else folder
    owner: dict[str, str] = {}
    for folder, class_name in known.items():
        if (other := owner.setdefault(class_name, folder)) != folder:
            raise DataError(
                f"{name}: the folders {other} and {folder} are one class of the model, {class_name}. "
                "Move their images into one folder."
            )
    return list(known.values())


def _folded(name: str) -> str:
    return name.replace("_", " ").casefold()


def predict_index(
    classifier: ImageClassifier,
    source: ImageSource,
    config: InferenceConfig | None = None,
    *,
    restrict: bool = False,
    tta: str = "none",
) -> Predictions:
    """Classify every image, once each, in the order of the index.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        restrict: Whether only classes that the index has images of can be predicted.
        tta: ``none``, or ``flip``: the mean of the probabilities of an image and of its mirror image. The
            temperature sharpens or blurs that mean, so that it changes no prediction.

    Raises:
        ConfigError: If ``tta`` is unknown.
        ModelFileError: If the model has no head, or logits are not finite.
    """
    require_head(classifier)
    check_tta(tta)
    config = config or InferenceConfig()

    def flip_averaged(images: Tensor) -> Tensor:
        return _log_mean_probs(classifier(images).float(), classifier(images.flip(-1)).float())

    started = time.perf_counter()
    index = source.index
    logits = torch.full((len(index), len(classifier.class_names)), torch.nan)
    errors: dict[int, str] = {}
    compute = flip_averaged if tta == "flip" else classifier
    for outputs in batches(classifier, source, compute, config):
        errors |= outputs.failures
        if outputs.values is not None:
            logits[outputs.done] = outputs.values
    if restrict:
        logits[:, torch.from_numpy(index.counts() == 0)] = -torch.inf
    scoring = Scoring(classifier.temperature, restrict, tta, config.exact, **config.record)
    probs = classifier.probs(logits).numpy()
    return Predictions(index, probs, errors, time.perf_counter() - started, scoring)


def _log_mean_probs(*logits: Tensor) -> Tensor:
    """Logits whose softmax is the mean of the softmaxes."""
    return torch.stack([each.log_softmax(dim=1) for each in logits]).logsumexp(dim=0)


def check_tta(tta: str) -> None:
    """Raise ConfigError for a ``--tta`` that is not in `TTAS`."""
    check_choice("--tta", tta, TTAS)


def predict_batches(
    classifier: ImageClassifier,
    paths: Iterable[str | Path],
    *,
    top_k: int = 1,
    config: InferenceConfig | None = None,
) -> Iterator[list[Row]]:
    """Label image files as they come: one row a path, in the order of the paths, a batch at a time.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        paths: Files; an endless source will do. It is read only a few batches ahead.
        top_k: Classes a row.

    Raises:
        ConfigError: If ``top_k`` is not in [1, classes].
        ModelFileError: If the model has no head, or logits are not finite.
    """
    check_top_k(classifier, top_k)
    return (_rows(classifier, out, top_k) for out in batches(classifier, paths, classifier, config))


def check_top_k(classifier: ImageClassifier, top_k: int) -> None:
    """Raise ConfigError if a classifier cannot name that many classes, ModelFileError if it has no head."""
    require_head(classifier)
    if not 1 <= top_k <= len(classifier.class_names):
        raise ConfigError(
            f"--top_k must be from 1 to the model's {len(classifier.class_names)} classes; got {top_k}."
        )


def _rows(classifier: ImageClassifier, outputs: Outputs[Tensor], top_k: int) -> list[Row]:
    rows = [Row(path, (), outputs.errors.get(place)) for place, path in enumerate(outputs.items)]
    if outputs.values is None:
        return rows
    probs, names = classifier.probs(outputs.values).numpy(), classifier.class_names
    # stable: of equal ones the first, as argmax has it
    best = probs.argmax(1)[:, None] if top_k == 1 else np.argsort(-probs, 1, kind="stable")[:, :top_k]
    for i, place in enumerate(outputs.places):
        rows[place] = Row(
            outputs.items[place], tuple((names[k], float(probs[i, k])) for k in best[i].tolist())
        )
    return rows
