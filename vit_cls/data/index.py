"""A folder of class folders to a compact index: relative paths, labels, class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vit_cls.data.listing import EXTENSIONS as EXTENSIONS
from vit_cls.data.listing import list_images
from vit_cls.data.path_table import CHUNK, PathTable, iter_bytes
from vit_cls.errors import DataError


@dataclass(frozen=True)
class ImageIndex:
    """Which image files there are, and the class of each.

    Args:
        root: The folder that the paths are relative to.
        paths: Relative paths with forward slashes, sorted within each class.
        labels: Position of each image's class in ``class_names``, int64.
        class_names: All classes, in the order of their labels.
        groups: What each image belongs to (a patient, a video), where that is known: images of one group are
            not split between training and validation.
        weights: How often each image is drawn in training, relative to the others, where that is given.
    """

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    class_names: list[str]
    groups: Sequence[str] | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Where image ``index`` lies."""
        return self.root / self.paths[index]

    def counts(self) -> np.ndarray:
        """Images of each class, int64, shape ``(classes,)``."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def subset(self, indices: np.ndarray) -> ImageIndex:
        """The images at ``indices``, with the same class names and labels."""
        return replace(
            self,
            paths=_take(self.paths, indices),
            labels=self.labels[indices],
            groups=None if self.groups is None else _take(self.groups, indices),
            weights=None if self.weights is None else self.weights[indices],
        )

    def with_class_names(self, class_names: Sequence[str]) -> ImageIndex:
        """The same images with labels that point into another class list, matched by name.

        Args:
            class_names: A list that holds every class of this index.
        """
        position = {name: i for i, name in enumerate(class_names)}
        lookup = np.array([position[name] for name in self.class_names], dtype=np.int64)
        return replace(self, labels=lookup[self.labels], class_names=list(class_names))

    def fingerprint(self) -> str:
        """A digest of paths and class names, to tell whether two runs saw the same files.

        File contents are not read: that would cost as much as an epoch.
        """
        digest = hashlib.blake2b(digest_size=16)
        endings = [f"\0{name}\n".encode("utf-8", "surrogateescape") for name in self.class_names]
        paths = iter_bytes(self.paths)
        for start in range(0, len(self), CHUNK):
            labels = self.labels[start : start + CHUNK].tolist()
            digest.update(b"".join([next(paths) + endings[label] for label in labels]))
        return digest.hexdigest()


def index_folder(root: str | Path, *, name: str = "data.root", min_classes: int = 2) -> ImageIndex:
    """Index a folder with one sub-folder a class.

    Hidden files and folders are passed over, and files whose extension is no image format's. Images may lie
    deeper inside a class folder. Classes and files are in lexicographic order.

    Args:
        root: The folder.
        name: What the user called it, for error messages.
        min_classes: 1 where the classes are known from elsewhere, and this folder may lack some.

    Raises:
        DataError: If the folder is missing or cannot be read, has too few class folders, or a class has no
            image.

    Source:
        The layout is torchvision's ``ImageFolder``.
    """
    root = Path(root)
    classes = class_folders(root, name=name)
    if not classes:
        raise DataError(
            f"{name} {root} has no class folders. It must hold one sub-folder a class, each with image files."
        )
    if len(classes) < min_classes:
        raise DataError(
            f"{name} {root} has only one class folder ({classes[0]}); a classifier needs at least two."
        )
    try:
        runs = list_images(str(root), classes)
    except OSError as error:  # no permission, or a link that leads back to its own folder
        raise DataError(f"{name}: {error.filename} cannot be read: {error.strerror}.") from error
    counts = dict.fromkeys(classes, 0)
    for begin, count, _ in runs:
        counts[begin[: begin.index(b"/")].decode("utf-8", "surrogateescape")] += count
    empty = [class_name for class_name, count in counts.items() if not count]
    if empty:
        raise DataError(
            f"{name} {root} has {'a class folder' if len(empty) == 1 else 'class folders'} without images: "
            f"{', '.join(empty[:10])}. Put images there (.jpg, .png, .webp, ...) or remove the folder."
        )
    labels = np.repeat(np.arange(len(classes)), list(counts.values()))
    return ImageIndex(root, PathTable.from_runs(runs), labels, classes)


def class_folders(root: Path, *, name: str) -> list[str]:
    """Names of the visible sub-folders of ``root``, in lexicographic order.

    Args:
        root: The folder.
        name: What the user called it, for error messages.

    Raises:
        DataError: If ``root`` is not a folder that can be read.
    """
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except FileNotFoundError:
        raise DataError(f"{name} {root} does not exist. Give a folder with one sub-folder a class.") from None
    except OSError as error:
        raise DataError(f"{name} {root} cannot be read as a folder: {error.strerror}.") from error


def balanced_weights(index: ImageIndex) -> np.ndarray:
    """Weights with which every class is drawn equally often.

    Args:
        index: Training images. Weights of its own say how often an image is drawn within its class.

    Returns:
        float64, shape ``(images,)``, 1 on average. Classes without an image, or whose weights are all zero,
        are not drawn.

    Example:
        >>> index = ImageIndex(Path(), ["a/1", "a/2", "a/3", "b/1"], np.array([0, 0, 0, 1]), ["a", "b"])
        >>> balanced_weights(index).round(3).tolist()
        [0.667, 0.667, 0.667, 2.0]
    """
    own = np.ones(len(index)) if index.weights is None else index.weights
    totals = np.bincount(index.labels, weights=own, minlength=len(index.class_names))
    drawn = totals > 0
    per_class = np.zeros_like(totals)
    per_class[drawn] = len(index) / drawn.sum() / totals[drawn]
    return own * per_class[index.labels]


def _take(strings: Sequence[str], indices: np.ndarray) -> Sequence[str]:
    if isinstance(strings, PathTable):
        return strings.take(indices)
    return PathTable([strings[i] for i in np.arange(len(strings))[indices].tolist()])
