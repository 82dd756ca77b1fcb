"""Three parts of one data set: to fit on, to choose by, and to report on once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from vit_cls.data.dataset import ArraySource, FolderSource, ImageSource
from vit_cls.data.digits import load_digits
from vit_cls.data.index import ImageIndex, class_folders, index_folder
from vit_cls.data.splits import TRAIN_FOLDERS, held_out_share, match_classes, stratified_split
from vit_cls.errors import ConfigError, DataError

DIGITS = "digits"
VAL_NAMES = ("val", "validation", "valid")
TEST_NAMES = ("test", "testing")
PARTS = ("train", "val", "test")
TEST_SEED = 0
"""The test images are the same whatever the seed, so that results of several seeds can be paired."""


@dataclass(frozen=True)
class Partition:
    """Images to fit on, to choose by and to report on; no image is in two parts.

    Args:
        train: What is fitted is fitted on these.
        val: Every choice (a penalty, a number of neighbours) is made on these.
        test: Touched once, with what was chosen.
        origin: One sentence: where each part came from.
        made_here: Which of ``val`` and ``test`` were split off here; the others were there already.
    """

    train: ImageSource
    val: ImageSource
    test: ImageSource
    origin: str
    made_here: tuple[str, ...] = ()

    @property
    def class_names(self) -> list[str]:
        """The classes of the training part, by which all parts are labelled."""
        return self.train.index.class_names

    def counts(self) -> dict[str, int]:
        """Images of each part, by its name."""
        return {part: len(getattr(self, part).index) for part in PARTS}

    def refuse_unused(self, fractions: Mapping[str, float]) -> None:
        """Refuse shares that the user asked for and that have no effect, for the part is there already.

        Args:
            fractions: What the user gave, by name: ``val_fraction`` and ``test_fraction``.

        Raises:
            ConfigError: If one of them has no effect.

        Example:
            >>> partition_data("digits").refuse_unused({"val_fraction": 0.3})
        """
        for label, fraction in fractions.items():
            part = label.removesuffix("_fraction")
            if part not in self.made_here:
                raise ConfigError(
                    f"--{label} {fraction:g} has no effect, for the {part} part is not split off here "
                    f"({self.origin}). Leave it out."
                )


def partition_data(
    data: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.25,
    name: str = "--data",
) -> Partition:
    """Find or make the three parts of some data.

    Args:
        data: ``digits``, the embedded ones, unless there is a folder of that name; or a folder with
            ``train/`` and ``val/`` and ``test/``, or with ``train/`` and one of the two, which is then the
            test part; or a folder of class folders.
        seed: Which validation images are held out, where there are none.
        val_fraction: Share of each class to validate on, in (0, 1), where that is split here.
        test_fraction: Share of each class to test on, in (0, 1), where that is split here; the same images
            whatever ``seed``.
        name: What the user called the data, for error messages.

    Raises:
        DataError: If there is no such folder, a part has a class that training lacks, two parts share a
            folder, or there are too few images for three parts.
        ConfigError: If a fraction is out of range.

    Example:
        >>> partition_data("digits").counts()
        {'train': 959, 'val': 239, 'test': 599}
    """
    for label, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"{label} must be between 0 and 1 (both excluded); got {fraction:g}.")
    root = Path(data)
    if str(data) == DIGITS and not root.is_dir():
        return _partition_digits(seed, val_fraction)
    folders = class_folders(root, name=name)
    train_name = _first(TRAIN_FOLDERS, folders)
    val_name, test_name = _first(VAL_NAMES, folders), _first(TEST_NAMES, folders)
    if train_name is not None and _is_a_class(root / train_name, name):
        train_name = None
    if train_name is not None and (val_name or test_name):
        return _partition_split(root, (train_name, val_name, test_name), seed, val_fraction, name)
    if train_name is not None:
        raise DataError(
            f"{name} {root} has {train_name}/ but no val/ or test/ folder. Add one, or give "
            f"{root / train_name} itself, which is then split into three."
        )
    looks_split = [one for one in (val_name, test_name) if one]
    if looks_split and len(looks_split) == len(folders):
        raise DataError(
            f"{name} {root} has {' and '.join(one + '/' for one in looks_split)} but no train/ folder. Add "
            f"one, or give {root / looks_split[0]} itself, which is then split into three."
        )
    index = index_folder(root, name=name)
    rest, test = _hold_out(index, test_fraction, TEST_SEED, f"{name} {root}", "test")
    train, val = _hold_out(rest, val_fraction, seed, f"{name} {root}", "val")
    origin = (
        f"{held_out_share(rest, test, test_fraction, None)} of {root} is the test part (the same for every "
        f"seed); {held_out_share(train, val, val_fraction, None)} of the rest is for validation, seed {seed}"
    )
    made = FolderSource(train), FolderSource(val), FolderSource(test)
    return Partition(*made, origin, made_here=("val", "test"))


def _partition_digits(seed: int, val_fraction: float) -> Partition:
    everything = load_digits("train")
    parts = stratified_split(everything.index, val_fraction=val_fraction, seed=seed)
    rows = {path: i for i, path in enumerate(everything.index.paths)}
    train, val = (ArraySource(part, everything.images[[rows[path] for path in part.paths]]) for part in parts)
    origin = (
        f"embedded digits: their held-out third is the test part; {val_fraction:g} of each class of the "
        f"other two thirds is for validation, seed {seed}"
    )
    return Partition(train, val, load_digits("test"), origin, made_here=("val",))


def _partition_split(
    root: Path, names: tuple[str, str | None, str | None], seed: int, val_fraction: float, name: str
) -> Partition:
    """The parts of a folder that is split already, at least into two."""
    train_name, val_name, test_name = names
    train = index_folder(root / train_name, name=f"{name}: {train_name}/")
    others = {
        other: index_folder(root / other, name=f"{name}: {other}/", min_classes=1)
        for other in (val_name, test_name)
        if other is not None
    }
    _refuse_shared_folders({train_name: train, **others}, name)
    others = {other: match_classes(index, train.class_names) for other, index in others.items()}
    if val_name is not None and test_name is not None:
        val, test = others[val_name], others[test_name]
        origin = f"the folders {train_name}/, {val_name}/ and {test_name}/ of {root}"
        return Partition(FolderSource(train), FolderSource(val), FolderSource(test), origin)
    (only,) = others
    kept, val = _hold_out(train, val_fraction, seed, f"{name} {root / train_name}", "val")
    origin = (
        f"{only}/ of {root} is the test part; {held_out_share(kept, val, val_fraction, None)} of "
        f"{train_name}/ is for validation, seed {seed}"
    )
    made = FolderSource(kept), FolderSource(val), FolderSource(others[only])
    return Partition(*made, origin, made_here=("val",))


def _hold_out(
    index: ImageIndex, fraction: float, seed: int, where: str, part: str
) -> tuple[ImageIndex, ImageIndex]:
    if int(np.max(index.counts())) < 2:
        raise DataError(
            f"{where}: too few images for three parts (train, val, test): {len(index)} images of "
            f"{len(index.class_names)} classes are left, at most one a class, so none can be held out as the "
            f"{part} part. Give at least three images a class, or folders train/, val/ and test/."
        )
    return stratified_split(index, val_fraction=fraction, seed=seed)


def _is_a_class(folder: Path, name: str) -> bool:
    """A class may be called train, as CIFAR-100 has one: its folder holds images, not folders."""
    return not class_folders(folder, name=name)


def _refuse_shared_folders(parts: dict[str, ImageIndex], name: str) -> None:
    """Links can make one folder a part of two, which would then be fitted on and tested on."""
    folders = {
        part: {_identity(path): path for path in (index.root, *(index.root / c for c in index.class_names))}
        for part, index in parts.items()
    }
    for one, other in combinations(parts, 2):
        for identity in sorted(folders[one].keys() & folders[other].keys()):
            raise DataError(
                f"{name}: {folders[other][identity]} is the same folder as {folders[one][identity]}, so "
                "images would be in two parts. Put other images there, or remove it."
            )


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _first(candidates: tuple[str, ...], folders: list[str]) -> str | None:
    """The folder, as spelled on disk, that matches the earliest candidate whatever its case."""
    by_lower = {name.lower(): name for name in reversed(folders)}
    return next((by_lower[name] for name in candidates if name in by_lower), None)
