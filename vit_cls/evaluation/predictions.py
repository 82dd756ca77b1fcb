"""A classifier's answer for every image of a folder, once each, failures included."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from vit_cls.data.dataset import FolderSource, ImageDataset
from vit_cls.data.index import ImageIndex, class_folders, index_folder
from vit_cls.data.loader import default_num_workers, make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.data.splits import TRAIN_FOLDERS, VAL_FOLDERS, match_classes
from vit_cls.data.transforms import eval_transform
from vit_cls.errors import ConfigError, DataError, ModelFileError
from vit_cls.model.classifier import ImageClassifier

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "32", "bf16")


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

    @property
    def scored(self) -> np.ndarray:
        """Positions of the images that have a prediction."""
        return np.array([i for i in range(len(self.index)) if i not in self.errors], dtype=np.int64)


def index_for_model(root: str | Path, classifier: ImageClassifier) -> ImageIndex:
    """Index a test folder with the labels of a model's classes.

    Args:
        root: One sub-folder a class; classes of the model may be missing, others may not be there.
        classifier: Knows the classes.

    Raises:
        DataError: If the folder cannot be used, or has classes that the model lacks.
    """
    folders = class_folders(Path(root), name="--data")
    splits = [name for name in folders if name.lower() in TRAIN_FOLDERS + VAL_FOLDERS]
    if splits and len(splits) == len(folders) and not set(splits) & set(classifier.class_names):
        raise DataError(
            f"--data {root} holds splits ({', '.join(splits)}), not classes. "
            f"Choose one: --data {Path(root) / splits[0]}."
        )
    return match_classes(index_folder(root, name="--data", min_classes=1), classifier.class_names)


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
        show_progress: Whether a bar is drawn on stderr.

    Returns:
        Probabilities and failures, in the order of the index.

    Raises:
        ConfigError: If the device or a number is not available.
        ModelFileError: If the model has no head, or logits are not finite.
    """
    if not classifier.class_names:
        raise ModelFileError(
            "the model has no head, so it cannot name a class. Train one: vit-cls fit --config "
            "configs/linear_probe.yaml --model.name NAME --model.pretrained WEIGHTS --data.root FOLDER."
        )
    started = time.perf_counter()
    where = choose_device(device)
    low = choose_bf16(precision, where)
    pre = classifier.preprocess
    transform = eval_transform(
        pre.img_size,
        crop_pct=pre.crop_pct,
        crop_mode=pre.crop_mode,
        interpolation=pre.interpolation,
        exact=exact,
    )
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
                logits[batch.indices.to(where)] = classifier(images).float()
    probs = logits.cpu().double().softmax(dim=1).numpy()
    predictions = Predictions(index, probs, errors, time.perf_counter() - started)
    _refuse_diverged(predictions)
    return predictions


def _refuse_diverged(predictions: Predictions) -> None:
    broken = [i for i in predictions.scored if not np.isfinite(predictions.probs[i]).all()]
    if broken:
        raise ModelFileError(
            f"no finite logits for {len(broken)} of {len(predictions.scored)} images, "
            f"the first {predictions.index.path(broken[0])}: weights that diverged, or --precision bf16."
        )


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
