"""Anybody's dataset of images and labels as a source of images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from vit_cls.data.decode import BACKGROUND, picture_to_tensor
from vit_cls.data.index import ImageIndex, PathTable
from vit_cls.errors import ConfigError, DataError, ImageError

log = logging.getLogger("vit_cls")


class DatasetSource:
    """The images of a ``torch.utils.data.Dataset`` whose items are (image, label).

    An image is Pillow's, or a uint8 tensor, ``(3, height, width)`` or grey ``(1, height, width)``; a label is
    the position of a class. An item that raises an exception is an image that cannot be read. Labels are the
    dataset's ``targets`` where it has them, as torchvision's do; else all items are read once.

    Args:
        part: What the dataset is for, for names: item 7 is called ``part[7]``.

    Raises:
        ConfigError: If the dataset has no length, or its first item is not of that form.
        DataError: If a label is none of the classes.
    """

    def __init__(self, dataset: Any, class_names: Sequence[str], part: str) -> None:
        name = type(dataset).__name__
        if isinstance(dataset, IterableDataset) or not all(
            hasattr(dataset, method) for method in ("__len__", "__getitem__")
        ):
            raise ConfigError(
                f"the {part} dataset, {name}, must have a length and items by number (a map-style dataset): "
                "their order is a function of the seed."
            )
        self.dataset = dataset
        self.background = BACKGROUND
        _check_form(dataset, f"{part}[0] of {name}")
        labels = _labels(dataset, f"the {part} dataset, {name},")
        for i in np.flatnonzero((labels < 0) | (labels >= len(class_names)))[:1].tolist():
            raise DataError(
                f"{part}[{i}] of {name} has the label {labels[i]}, but there are {len(class_names)} class "
                f"names, so labels must be from 0 to {len(class_names) - 1}."
            )
        paths = PathTable(f"{part}[{i}]" for i in range(len(dataset)))
        self.index = ImageIndex(Path(name), paths, labels, list(class_names))

    def read(self, index: int) -> Tensor:
        """See `ImageSource.read`."""
        try:
            image, label, *_ = self.dataset[index]
        except Exception as error:  # code of the user's may raise anything
            raise ImageError(f"{type(error).__name__}: {error}") from error
        if int(label) != self.index.labels[index]:
            raise ImageError(f"its label is {int(label)}, but was {self.index.labels[index]} at first")
        return _pixels(image, self.background)


def dataset_sources(class_names: Sequence[str] | None, **datasets: Any) -> dict[str, DatasetSource]:
    """A source for each part that has a dataset; see `ImageDataModule.of_datasets`."""
    train = datasets["train"]
    names = _classes(train) if class_names is None else list(class_names)
    if names is None:
        raise ConfigError(
            f"class_names is missing: {type(train).__name__} has no `classes`. Give one name a label."
        )
    return {
        part: DatasetSource(dataset, names, part) for part, dataset in datasets.items() if dataset is not None
    }


def _classes(dataset: Any) -> list[str] | None:
    """The ``classes`` of a dataset of torchvision's, or of a part of one."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return None if names is None else [str(name) for name in names]


def _pixels(image: Any, background: tuple[int, int, int]) -> Tensor:
    """The image as uint8 ``(3, height, width)``; ImageError where it is none."""
    if isinstance(image, Image.Image):
        return picture_to_tensor(image, background)
    if (
        isinstance(image, Tensor)
        and image.dtype == torch.uint8
        and image.ndim == 3
        and image.shape[0] in (1, 3)
    ):
        return image.as_subclass(Tensor).expand(3, -1, -1)
    kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise ImageError(f"it is neither a Pillow image nor a uint8 tensor (3, height, width), but {kind}")


def _check_form(dataset: Any, where: str) -> None:
    """The first item, to tell a mistake before any training; one that cannot be read is met again."""
    if not len(dataset):
        raise ConfigError(f"{where.replace('[0]', '')} has no items.")
    try:
        item = dataset[0]
    except Exception:  # code of the user's may raise anything
        return
    try:
        image, label, *_ = item
        int(label)
        _pixels(image, BACKGROUND)
    except (TypeError, ValueError, ImageError) as error:
        raise ConfigError(
            f"{where} must be (image, label), a Pillow image or a uint8 tensor (3, height, width) and a "
            f"whole number: {error}. The classifier scales and normalises pixels itself: leave ToTensor, "
            "ToDtype and Normalize out of the dataset's transform."
        ) from error


def _labels(dataset: Any, what: str) -> np.ndarray:
    """Label of each item, int64."""
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset, what)[np.asarray(dataset.indices, dtype=np.int64)]
    told = getattr(dataset, "targets", None)
    if told is not None and getattr(dataset, "target_transform", None) is None and len(told) == len(dataset):
        labels = np.asarray(told)
        if labels.ndim == 1 and labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    log.info(f"{what} has no targets: its {len(dataset):,} items are read once for their labels")
    labels = np.zeros(len(dataset), dtype=np.int64)
    for i in range(len(dataset)):
        try:
            labels[i] = int(dataset[i][1])
        except Exception:  # met again when it is trained on, and told there
            continue
    return labels
