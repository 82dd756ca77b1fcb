"""A folder of class folders to a compact index: relative paths, labels, class names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vit_cls.data.listing import EXTENSIONS as EXTENSIONS
from vit_cls.data.listing import list_images
from vit_cls.data.parts import class_folders
from vit_cls.errors import DataError

CHUNK = 16_384
"""Strings that are handled at once: large enough for numpy, small enough to be forgotten."""


@dataclass(frozen=True)
class ImageIndex:
    """Which image files there are, and the class of each.

    Args:
        root: The folder that the paths are relative to.
        paths: Relative paths with forward slashes, sorted within each class.
        labels: Position of each image's class in ``class_names``, int64.
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

    def with_class_names(self, class_names: Sequence[str], *, where: str = "") -> ImageIndex:
        """The same images with labels that point into another class list, which may be longer, by name.

        Raises:
            DataError: If the index, or ``where`` it is from, has a class that the list lacks; both are shown.
        """
        position = {name: i for i, name in enumerate(class_names)}
        if unknown := sorted(set(self.class_names) - position.keys()):
            raise DataError(
                f"{where or self.root} has {len(unknown)} class(es) that are not known: {_listed(unknown)}. "
                f"Its classes: {_listed(self.class_names)}. Known classes: {_listed(class_names)}. "
                "Classes are matched by name, of folders or of labels; rename or remove the unknown ones."
            )
        lookup = np.array([position[name] for name in self.class_names], dtype=np.int64)
        return replace(self, labels=lookup[self.labels], class_names=list(class_names))

    def fingerprint(self) -> str:
        """A digest of paths and class names, to tell whether two runs saw the same files; not of contents."""
        digest = hashlib.blake2b(digest_size=16)
        endings = [f"\0{name}\n".encode("utf-8", "surrogateescape") for name in self.class_names]
        paths = iter_bytes(self.paths)
        for start in range(0, len(self), CHUNK):
            labels = self.labels[start : start + CHUNK].tolist()
            digest.update(b"".join([next(paths) + endings[label] for label in labels]))
        return digest.hexdigest()


def index_folder(root: str | Path, *, name: str = "data.root", min_classes: int = 2) -> ImageIndex:
    """Index a folder with one sub-folder a class, the layout of torchvision's ``ImageFolder``.

    Hidden files and folders are passed over, and files whose extension is no image format's. Images may lie
    deeper inside a class folder. Classes and files are in lexicographic order.

    Raises:
        DataError: If the folder, which the user calls ``name``, cannot be read, has too few class folders, or
            a class has no image.
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


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def balanced_weights(index: ImageIndex) -> np.ndarray:
    """Weights, 1 on average, with which every class is drawn equally often that can be drawn at all.

    Weights of the index say how often an image is drawn within its class.
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


class PathTable(Sequence[str]):
    """Strings in a few arrays: a million paths are one object, so worker processes share their memory.

    A path is stored as the number of its beginning (its folder, as a rule) and the rest.
    """

    _beginnings: _Texts
    _beginning: np.ndarray
    _rests: _Texts

    def __init__(self, paths: Iterable[str]) -> None:
        numbers: dict[bytes, int] = {}
        rests: list[bytes] = []
        beginning: list[int] = []
        for path in paths:
            # surrogateescape: file names need not be valid UTF-8
            encoded = path.encode("utf-8", "surrogateescape")
            cut = encoded.rfind(b"/") + 1
            beginning.append(numbers.setdefault(encoded[:cut], len(numbers)))
            rests.append(encoded[cut:])
        self._beginnings = _Texts.of(list(numbers))
        self._beginning = _small(np.array(beginning, dtype=np.int64))
        self._rests = _Texts.of(rests)

    @classmethod
    def from_runs(cls, runs: Sequence[tuple[bytes, int, bytes]]) -> PathTable:
        """Build from runs of paths: how they begin, their number, and their rests, each closed by a NUL."""
        table = cls(())
        counts = np.array([count for _, count, _ in runs], dtype=np.int64)
        joined = b"".join([rests for _, _, rests in runs])
        ends = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == 0)
        assert len(ends) == counts.sum()
        ends -= np.arange(len(ends))
        table._beginnings = _Texts.of([beginning for beginning, _, _ in runs])
        table._beginning = np.repeat(_small(np.arange(len(runs))), counts)
        table._rests = _Texts(joined.replace(b"\0", b""), _small(ends))
        return table

    def __len__(self) -> int:
        return len(self._beginning)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        encoded = self._beginnings[int(self._beginning[index])] + self._rests[index]
        return encoded.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for encoded in self.iter_bytes():
            yield encoded.decode("utf-8", "surrogateescape")

    def iter_bytes(self) -> Iterator[bytes]:
        """The strings as bytes: UTF-8, and what is not UTF-8 as it is on the disk."""
        for start in range(0, len(self), CHUNK):
            numbers = self._beginning[start : start + CHUNK].tolist()
            beginnings = {number: self._beginnings[number] for number in set(numbers)}
            rests = self._rests.between(start, start + CHUNK)
            for number, rest in zip(numbers, rests, strict=True):
                yield beginnings[number] + rest

    def take(self, indices: np.ndarray) -> PathTable:
        """The strings at some positions, or where a truth value for each string is true."""
        positions = np.arange(len(self))[indices]
        table = PathTable(())
        table._beginnings = self._beginnings
        table._beginning = self._beginning[positions]
        table._rests = self._rests.take(positions)
        return table


def iter_bytes(strings: Sequence[str]) -> Iterator[bytes]:
    """Strings as bytes, with surrogates as the bytes they stand for; fast where they are a `PathTable`."""
    if isinstance(strings, PathTable):
        return strings.iter_bytes()
    return (string.encode("utf-8", "surrogateescape") for string in strings)


class _Texts:
    """Byte strings, one after the other in one, and where each ends."""

    def __init__(self, data: bytes, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> _Texts:
        return cls(b"".join(texts), _small(np.cumsum([len(text) for text in texts], dtype=np.int64)))

    def __getitem__(self, index: int) -> bytes:
        return self.data[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def between(self, start: int, stop: int) -> list[bytes]:
        ends = self.ends[start:stop].tolist()
        starts = [int(self.ends[start - 1]) if start else 0, *ends[:-1]]
        return [self.data[first:last] for first, last in zip(starts, ends, strict=True)]

    def take(self, positions: np.ndarray) -> _Texts:
        starts = np.concatenate([np.zeros(1, self.ends.dtype), self.ends[:-1]])[positions].astype(np.int64)
        lengths = self.ends[positions] - starts
        ends = np.cumsum(lengths)
        source = np.frombuffer(self.data, dtype=np.uint8)
        taken = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        for first in range(0, len(positions), CHUNK):
            length, end = lengths[first : first + CHUNK], ends[first : first + CHUNK]
            begin = int(end[0] - length[0])
            # byte j of the result is byte (start of its string there - start here + j) of the source
            shift = np.repeat(starts[first : first + CHUNK] - (end - length), length)
            taken[begin : int(end[-1])] = source[shift + np.arange(begin, int(end[-1]))]
        return _Texts(taken.tobytes(), _small(ends))


def _small(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 in the smallest of three types that holds them."""
    largest = int(numbers.max()) if len(numbers) else 0
    for dtype in (np.uint16, np.uint32):
        if largest <= np.iinfo(dtype).max:
            return numbers.astype(dtype)
    return numbers
