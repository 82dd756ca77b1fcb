"""A classifier's answer for every image of a folder, once each, failures included."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vit_cls.data.dataset import FolderSource, ImageDataset
from vit_cls.data.index import ImageIndex, class_folders, index_folder
from vit_cls.data.loader import default_num_workers, make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.data.splits import TRAIN_FOLDERS, VAL_FOLDERS, match_classes
from vit_cls.errors import ConfigError, DataError, ModelFileError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.file_classifier import NO_HEAD, transform_of

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "32", "bf16")
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
    """

    temperature: float = 1.0
    restricted: bool = False
    tta: str = "none"
    exact: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted on validation images."""
        return self.temperature != 1.0


AS_IS = Scoring()


@dataclass(frozen=True)
class Predictions:
    """What a classifier said about each image of an index.

    Args:
        index: The images, labelled by the classifier's classes.
        probs: Probabilities, float64, shape ``(images, classes)``; NaN where the image failed.
        errors: Why an image has no prediction, by its position.
        seconds: Wall time of loading and predicting.
        scoring: How the images became probabilities.
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


def index_for_model(root: str | Path, classifier: ImageClassifier, *, name: str = "--data") -> ImageIndex:
    """Index a test folder with the labels of a model's classes.

    Args:
        root: One sub-folder a class; classes of the model may be missing, others may not be there. Where the
            model's classes are WordNet ids, folders may have the ImageNet names instead.
        classifier: Knows the classes.
        name: What the user called the folder, for error messages.

    Raises:
        DataError: If the folder cannot be used, or has classes that the model lacks.
        ModelFileError: If the model has no head.
    """
    require_head(classifier)
    folders = class_folders(Path(root), name=name)
    splits = [name for name in folders if name.lower() in TRAIN_FOLDERS + VAL_FOLDERS]
    if splits and len(splits) == len(folders) and not set(splits) & set(classifier.class_names):
        raise DataError(
            f"{name} {root} holds splits ({', '.join(splits)}), not classes. "
            f"Choose one: {name} {Path(root) / splits[0]}."
        )
    index = index_folder(root, name=name, min_classes=1)
    known = canonical_classes(index.class_names, classifier.class_names, name=f"{name} {root}")
    return match_classes(replace(index, class_names=known), classifier.class_names)


def require_head(classifier: ImageClassifier) -> None:
    """Refuse a model that cannot name a class.

    Args:
        classifier: The model.

    Raises:
        ModelFileError: If it has no head.
    """
    if not classifier.class_names:
        raise ModelFileError(NO_HEAD)


def canonical_classes(folders: Sequence[str], class_names: Sequence[str], *, name: str) -> list[str]:
    """The model's name of each class folder, where a folder has another of the names of an ImageNet class.

    Args:
        folders: Names of the class folders.
        class_names: The model's classes.
        name: The folder of them, for error messages.

    Returns:
        One name a folder: the model's, or the folder's own where the model has no such class.

    Raises:
        DataError: If a name is that of several classes, or two folders are one class.

    Example:
        >>> canonical_classes(["tench", "n01443537", "dog"], ["n01440764", "n01443537"], name="photos")
        ['n01440764', 'n01443537', 'dog']
    """
    exact = set(class_names)
    known = {folder: folder for folder in folders}
    if not exact.issuperset(folders):
        from vit_cls.weights.class_names import class_aliases  # imports timm: seconds, for ImageNet alone

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


@torch.inference_mode()
def predict_index(
    classifier: ImageClassifier,
    index: ImageIndex,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    num_workers: int | None = None,
    compile: bool = False,
    exact: bool = False,
    restrict: bool = False,
    tta: str = "none",
    show_progress: bool = False,
) -> Predictions:
    """Classify every image of an index.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        index: The images.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``mps``.
        precision: ``auto`` (bf16 autocast on a GPU), ``32`` or ``bf16``.
        batch_size: Images a forward pass; does not change the result beyond rounding.
        num_workers: Loading processes; None means one a core, at most 8.
        compile: Whether the encoder's blocks are compiled.
        exact: Whether images are resized by Pillow, as timm's loader does it.
        restrict: Whether only classes that the index has images of can be predicted.
        tta: ``none``, or ``flip``: the mean of the probabilities of an image and of its mirror image. The
            temperature sharpens or blurs that mean, so that it changes no prediction.
        show_progress: Whether a bar is drawn on stderr.

    Returns:
        Probabilities and failures, in the order of the index.

    Raises:
        ConfigError: If the device or a number is not available.
        ModelFileError: If the model has no head, or logits are not finite.
    """
    require_head(classifier)
    check_tta(tta)
    started = time.perf_counter()
    where = choose_device(device)
    low = choose_bf16(precision, where)
    pre = classifier.preprocess
    transform = transform_of(pre, exact=exact)
    loader = make_loader(
        ImageDataset(FolderSource(index, pre.background), transform),
        EpochSampler(len(index), seed=0, shuffle=False),
        batch_size=batch_size,
        num_workers=default_num_workers() if num_workers is None else num_workers,
        pin_memory=where.type == "cuda",
    )
    classifier.to(where).eval()
    if compile:
        classifier.model.blocks.compile()
    logits = torch.full((len(index), len(classifier.class_names)), torch.nan, device=where)
    errors: dict[int, str] = {}
    console = Console(stderr=True, quiet=not show_progress)
    for batch in track(loader, "predicting", total=len(loader), console=console, disable=not show_progress):
        errors |= dict(batch.failures)
        if len(batch.indices):
            images = batch.images.to(where, non_blocking=True)
            with torch.autocast(where.type, dtype=torch.bfloat16, enabled=low):
                found = classifier(images).float()
                if tta == "flip":
                    found = _log_mean_probs(found, classifier(images.flip(-1)).float())
            logits[batch.indices.to(where)] = found
    logits = logits.cpu()
    _refuse_diverged(logits.numpy(), index, errors)
    if restrict:
        logits[:, torch.from_numpy(index.counts() == 0)] = -torch.inf
    scoring = Scoring(classifier.temperature, restrict, tta, exact)
    probs = classifier.probs(logits).numpy()
    return Predictions(index, probs, errors, time.perf_counter() - started, scoring)


def _log_mean_probs(*logits: Tensor) -> Tensor:
    """Logits whose softmax is the mean of the softmaxes."""
    return torch.stack([each.log_softmax(dim=1) for each in logits]).logsumexp(dim=0)


def _refuse_diverged(logits: np.ndarray, index: ImageIndex, errors: dict[int, str]) -> None:
    broken = [i for i in np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist() if i not in errors]
    if broken:
        raise ModelFileError(
            f"no finite logits for {len(broken)} of {len(index) - len(errors)} images, "
            f"the first {index.path(broken[0])}: weights that diverged, or --precision bf16."
        )


def check_tta(tta: str) -> None:
    """Refuse a test-time augmentation that there is not.

    Args:
        tta: What ``--tta`` says.

    Raises:
        ConfigError: If it is unknown.
    """
    if tta not in TTAS:
        raise ConfigError(f"--tta must be one of {', '.join(TTAS)}; got {tta!r}.")


def choose_device(device: str) -> torch.device:
    """The device that ``--device`` means.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        ConfigError: If it is unknown or not there.
    """
    if device not in DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}; got {device!r}.")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    if not there[device]:
        raise ConfigError(f"--device {device} is not available on this machine. Use --device auto or cpu.")
    return torch.device(device)


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``--precision`` means bf16 autocast on that device.

    Args:
        precision: ``auto``, ``32`` or ``bf16``.
        device: Where the model runs.

    Raises:
        ConfigError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
