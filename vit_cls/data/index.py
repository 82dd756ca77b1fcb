"""A folder of class folders to a compact index: relative paths, labels, class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_cls.errors import DataError

EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
    )
)


class PathTable(Sequence[str]):
    """Strings in two arrays: a million paths are one object, so worker processes share their memory.

    Args:
        paths: The strings, in order.

    Example:
        >>> PathTable(["a/1.png", "b/2.png"])[1]
        'b/2.png'
    """

    def __init__(self, paths: Sequence[str]) -> None:
        # surrogateescape: file names need not be valid UTF-8
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class ImageIndex:
    """Which image files there are, and the class of each.

    Args:
        root: The folder that the paths are relative to.
        paths: Relative paths with forward slashes, sorted within each class.
        labels: Position of each image's class in ``class_names``, int64.
        class_names: All classes, in the order of their labels.
    """

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    class_names: list[str]

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
        return ImageIndex(
            self.root, PathTable([self.paths[i] for i in indices]), self.labels[indices], self.class_names
        )

    def with_class_names(self, class_names: Sequence[str]) -> ImageIndex:
        """The same images with labels that point into another class list, matched by name.

        Args:
            class_names: A list that holds every class of this index.
        """
        position = {name: i for i, name in enumerate(class_names)}
        lookup = np.array([position[name] for name in self.class_names], dtype=np.int64)
        return ImageIndex(self.root, self.paths, lookup[self.labels], list(class_names))

    def fingerprint(self) -> str:
        """A digest of paths and class names, to tell whether two runs saw the same files.

        File contents are not read: that would cost as much as an epoch.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            digest.update(f"{path}\0{self.class_names[label]}\n".encode("utf-8", "surrogateescape"))
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
    paths: list[str] = []
    counts: list[int] = []
    for class_name in classes:
        try:
            found = sorted(_image_files(str(root), class_name))
        except OSError as error:  # no permission, or a link that leads back to its own folder
            raise DataError(f"{name}: {error.filename} cannot be read: {error.strerror}.") from error
        counts.append(len(found))
        paths += found
    empty = [class_name for class_name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{name} {root} has {'a class folder' if len(empty) == 1 else 'class folders'} without images: "
            f"{', '.join(empty[:10])}. Put images there (.jpg, .png, .webp, ...) or remove the folder."
        )
    return ImageIndex(root, PathTable(paths), np.repeat(np.arange(len(classes)), counts), classes)


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


def _image_files(root: str, folder: str) -> Iterator[str]:
    """Relative paths of the images below ``root/folder``."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            relative = f"{folder}/{entry.name}"
            if entry.is_dir():
                yield from _image_files(root, relative)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield relative
