"""Training and validation images of a data root: split folders as they are, or one split here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_cls.data.index import ImageIndex, class_folders, index_folder
from vit_cls.errors import ConfigError, DataError

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class Split:
    """What is trained on and what is validated on, and how that came about.

    Args:
        train: Training images.
        val: Validation images, labelled by the training classes.
        origin: One sentence for the log and the run record.
    """

    train: ImageIndex
    val: ImageIndex
    origin: str


def split_root(root: str | Path, *, val_fraction: float, seed: int) -> Split:
    """Find or make the training and validation images of ``data.root``.

    Args:
        root: A folder with ``train/`` and ``val/`` (or another usual spelling), a folder with ``train/``
            alone, or a folder of class folders. The last two are split here.
        val_fraction: Share of each class to validate on, in (0, 1), where a split is made.
        seed: Which split is made.

    Raises:
        DataError: If the folder is not usable, or validation has a class that training lacks.
        ConfigError: If ``val_fraction`` is out of range.
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
        train, val = stratified_split(index_folder(root), val_fraction=val_fraction, seed=seed)
        return Split(
            train, val, f"{val_fraction:g} of each class of {root} held out for validation, seed {seed}"
        )
    train = index_folder(root / train_name)
    val_name = _first(VAL_FOLDERS, folders)
    if val_name is None:
        train, val = stratified_split(train, val_fraction=val_fraction, seed=seed)
        looked_for = ", ".join(f"{name}/" for name in VAL_FOLDERS)
        origin = (
            f"no validation folder beside {root / train_name} (looked for {looked_for}): "
            f"{val_fraction:g} of each class of {train_name}/ held out, seed {seed}"
        )
        return Split(train, val, origin)
    val = index_folder(root / val_name, name=f"{val_name}/ of data.root", min_classes=1)
    val = match_classes(val, train.class_names)
    origin = f"{root / train_name} and {root / val_name}"
    if val_name.lower() == "test":
        origin += (
            " (no validation folder: the test folder selects the best epoch, so its score is optimistic)"
        )
    return Split(train, val, origin)


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


def stratified_split(index: ImageIndex, *, val_fraction: float, seed: int) -> tuple[ImageIndex, ImageIndex]:
    """Hold out a share of every class, the same files on every machine.

    Each file's place is a hash of its relative path and the seed, so adding files moves few others.

    Args:
        index: All images.
        val_fraction: Share of each class to hold out, in (0, 1), rounded; at least one image where a class
            has two or more, and never the last one.
        seed: Which split.

    Returns:
        The kept images and the held-out ones.

    Raises:
        ConfigError: If ``val_fraction`` is out of range.
        DataError: If nothing can be held out.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ConfigError(f"data.val_fraction must be between 0 and 1 (both excluded); got {val_fraction:g}.")
    held_out = np.zeros(len(index), dtype=bool)
    for label in range(len(index.class_names)):
        members = np.flatnonzero(index.labels == label)
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        order = sorted(members.tolist(), key=lambda i: _place(index.paths[i], seed))
        held_out[order[:count]] = True
    if not held_out.any():
        raise DataError(
            f"{index.root} has one image a class, so none can be held out for validation. "
            "Add images or a val/ folder."
        )
    return index.subset(np.flatnonzero(~held_out)), index.subset(np.flatnonzero(held_out))


def _place(path: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{path}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _first(candidates: tuple[str, ...], folders: list[str]) -> str | None:
    """The folder, as spelled on disk, that matches the earliest candidate whatever its case."""
    by_lower = {name.lower(): name for name in reversed(folders)}
    return next((by_lower[name] for name in candidates if name in by_lower), None)


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
