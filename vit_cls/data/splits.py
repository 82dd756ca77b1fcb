"""Training and validation images of a data root: split folders as they are, or one split here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_cls.data.grouping import hold_out_groups, name_groups, places, refuse_shared_groups
from vit_cls.data.index import ImageIndex, class_folders, index_folder
from vit_cls.data.path_table import iter_bytes
from vit_cls.errors import ConfigError, DataError

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "validation", "valid", "test")
OPTIMISTIC = "the test folder selects the best epoch, so its score is optimistic"


@dataclass(frozen=True)
class Split:
    """What is trained on and what is validated on, and how that came about.

    Args:
        train: Training images.
        val: Validation images, labelled by the training classes.
        origin: One sentence for the log and the run record.
        made_here: Whether the images were divided here, not by the user.
    """

    train: ImageIndex
    val: ImageIndex
    origin: str
    made_here: bool = False


def split_root(root: str | Path, *, val_fraction: float, seed: int, group_by: str | None = None) -> Split:
    """Find or make the training and validation images of ``data.root``.

    Args:
        root: A folder with ``train/`` and ``val/`` (or another usual spelling), a folder with ``train/``
            alone, or a folder of class folders. The last two are split here.
        val_fraction: Share of each class to validate on, in (0, 1), where a split is made.
        seed: Which split is made.
        group_by: See `stratified_split`. Where there is a validation folder, no group may be in both folders.

    Raises:
        DataError: If the folder is not usable, validation has a class that training lacks, or images would
            be trained on and validated on.
        ConfigError: If ``val_fraction`` is out of range, or ``group_by`` is no usable pattern.
    """
    root = Path(root)
    folders = class_folders(root, name="data.root")
    train_name = _first(TRAIN_FOLDERS, folders)
    others = [name for name in folders if name.lower() not in TRAIN_FOLDERS + VAL_FOLDERS]
    if train_name is not None and others and not class_folders(root / train_name, name="data.root"):
        train_name = None  # a class that is called train, as CIFAR-100 has one
    if train_name is None:
        looks_split = [name for name in folders if name.lower() in VAL_FOLDERS]
        if folders and len(looks_split) == len(folders):
            raise DataError(
                f"data.root {root} has {', '.join(looks_split)} but no folder to train on; looked for "
                f"{' or '.join(name + '/' for name in TRAIN_FOLDERS)}."
            )
        train, val = stratified_split(
            index_folder(root), val_fraction=val_fraction, seed=seed, group_by=group_by
        )
        share = held_out_share(train, val, val_fraction, group_by)
        origin = f"{share} of {root} held out for validation, seed {seed}"
        return Split(train, val, origin, made_here=True)
    val_name = _first(VAL_FOLDERS, folders)
    if val_name is not None:
        return _split_of_folders(root / train_name, root / val_name, group_by)
    train, val = stratified_split(
        index_folder(root / train_name), val_fraction=val_fraction, seed=seed, group_by=group_by
    )
    share = held_out_share(train, val, val_fraction, group_by)
    looked_for = ", ".join(f"{name}/" for name in VAL_FOLDERS)
    origin = (
        f"no validation folder beside {root / train_name} (looked for {looked_for}): "
        f"{share} of {train_name}/ held out, seed {seed}"
    )
    return Split(train, val, origin, made_here=True)


def _split_of_folders(train_root: Path, val_root: Path, group_by: str | None) -> Split:
    """The split that is there already."""
    if os.path.samefile(train_root, val_root):
        raise DataError(
            f"{val_root} is the same folder as {train_root}, so the model would be validated on what it was "
            f"trained on. Put other images there, or remove {val_root.name}/ to have a share held out."
        )
    train = index_folder(train_root)
    val = index_folder(val_root, name=f"{val_root.name}/ of data.root", min_classes=1)
    _refuse_shared_folders(train, val)
    val = match_classes(val, train.class_names)
    origin = f"{train_root} and {val_root}"
    if val_root.name.lower() == "test":
        origin += f" (no validation folder: {OPTIMISTIC})"
    if group_by is not None:
        groups, val_groups = name_groups(train, group_by), name_groups(val, group_by)
        assert groups is not None
        assert val_groups is not None
        parts = (train_root.name, val_root.name)
        refuse_shared_groups(groups, val_groups, where=f"data.group_by {group_by!r}", parts=parts)
        origin += f", no group of {group_by!r} in both"
    return Split(train, val, origin)


def _refuse_shared_folders(train: ImageIndex, val: ImageIndex) -> None:
    """Links can make one class folder a part of both."""
    trained = {_identity(train.root / name): name for name in train.class_names}
    for name in val.class_names:
        if (other := trained.get(_identity(val.root / name))) is not None:
            raise DataError(
                f"{val.root / name} is the same folder as {train.root / other}, so the model would be "
                "validated on what it was trained on. Put other images there."
            )


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def match_classes(index: ImageIndex, class_names: list[str]) -> ImageIndex:
    """Label an index by another class list, by name; the index may lack classes but not add any.

    Args:
        index: Images of a validation or test folder.
        class_names: The classes of the training data or the model.

    Raises:
        DataError: If the index has a class that ``class_names`` lacks; both lists are shown.
    """
    unknown = sorted(set(index.class_names) - set(class_names))
    if unknown:
        raise DataError(
            f"{index.root} has {len(unknown)} class(es) that are not known: {_listed(unknown)}. "
            f"Its classes: {_listed(index.class_names)}. Known classes: {_listed(class_names)}. "
            "Classes are matched by folder name; rename or remove the unknown folders."
        )
    return index.with_class_names(class_names)


def stratified_split(
    index: ImageIndex, *, val_fraction: float, seed: int, group_by: str | None = None
) -> tuple[ImageIndex, ImageIndex]:
    """Hold out a share of every class, the same files on every machine.

    Each file's place is a hash of its relative path and the seed, so adding files moves few others. Where
    images have groups, the same is true of groups: see `vit_cls.data.grouping.hold_out_groups`.

    Args:
        index: All images.
        val_fraction: Share of each class to hold out, in (0, 1), rounded; at least one image where a class
            has two or more, and never the last one. With groups, the share of each class's groups.
        seed: Which split.
        group_by: A regular expression with one capture group, found anywhere in the relative path: images
            of which it captures the same are never split. None keeps the groups of the index, if it has
            some, together.

    Returns:
        The kept images and the held-out ones.

    Raises:
        ConfigError: If ``val_fraction`` is out of range, or ``group_by`` is no usable pattern.
        DataError: If nothing can be held out, or ``group_by`` does not match a path.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ConfigError(f"data.val_fraction must be between 0 and 1 (both excluded); got {val_fraction:g}.")
    groups = name_groups(index, group_by)
    if groups is not None:
        held_out = hold_out_groups(index, groups, val_fraction=val_fraction, seed=seed)
    else:
        held_out = np.zeros(len(index), dtype=bool)
        place = places(iter_bytes(index.paths), seed, len(index))
        order = np.lexsort((place, index.labels))
        start = 0
        for count in index.counts().tolist():
            share = min(max(1, round(val_fraction * count)), count - 1)
            held_out[order[start : start + max(share, 0)]] = True
            start += count
    if not held_out.any():
        raise DataError(
            f"{index.root} has one image a class, so none can be held out for validation. "
            "Add images or a val/ folder."
        )
    return index.subset(np.flatnonzero(~held_out)), index.subset(np.flatnonzero(held_out))


def held_out_share(train: ImageIndex, val: ImageIndex, val_fraction: float, group_by: str | None) -> str:
    """What `stratified_split` has held out, in words for the log.

    Args:
        train: The images it kept.
        val: The images it held out.
        val_fraction: What it was asked for.
        group_by: What it was asked for.
    """
    if group_by is None and train.groups is None:
        return f"{val_fraction:g} of each class"
    by = "the manifest's" if group_by is None else f"by {group_by!r}"
    lacking = int(np.count_nonzero((val.counts() == 0) & (train.counts() > 0)))
    without = f"; {lacking} class(es) could give none" if lacking else ""
    images = f"{len(val)} of {len(train) + len(val)} images"
    return f"{val_fraction:g} of the groups of each class ({by}; {images}{without})"


def _first(candidates: tuple[str, ...], folders: list[str]) -> str | None:
    """The folder, as spelled on disk, that matches the earliest candidate whatever its case."""
    by_lower = {name.lower(): name for name in reversed(folders)}
    return next((by_lower[name] for name in candidates if name in by_lower), None)


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
